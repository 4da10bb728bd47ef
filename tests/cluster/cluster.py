"""Two nodes on one machine, made of Linux namespaces: each has its own processes, address, hostname, sshd and Slurm.

A node is the first process of a process namespace, which has its own network, hostname and mounts beside. When that
process ends, the kernel ends all that the node ran and takes its network away: nothing is left, however the tests end.
What a node needs under /etc, /run and /dev/shm is mounted over there, where the machine does not see it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).parents[2]
INTERFACE = "eth0"
TOOLS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
}
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_NAMESPACES = ("unshare", "-n", "-u", "-m", "-i", "-p", "-f", "--kill-child", "--mount-proc")
_INIT = """
set -e
hostname "$1"
ip link set lo up
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
mount -t tmpfs none /sys/fs/cgroup
mkdir -p /run/sshd /run/munge
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
touch "$2/$1/ready"
# A shell that waits takes in the processes whose parents have ended.
sleep infinity &
wait
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = {package for tool, package in TOOLS.items() if shutil.which(tool, path=_PATH) is None}
    if lacking:
        return f"not installed: {', '.join(sorted(lacking))}"
    probe = "mount -t tmpfs none /run && ip link add dso0 type veth peer name dso1"
    try:
        done = subprocess.run(
            [*_NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"namespaces do not work here: {error}"
    return None if done.returncode == 0 else f"namespaces are not permitted here: {done.stderr.strip()[:200]}"


class Cluster:
    """The nodes; a context manager. ``run`` starts a command on one of them."""

    def __init__(self, nodes: int = 2, cores: int = 4) -> None:
        assert nodes == 2, "the nodes are joined by one cable"
        self.names = [f"node{index + 1}" for index in range(nodes)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="ds_optim-cluster-"))
        self._cores = cores
        self._inits: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            for name in self.names:
                self._start_node(name)
            self._connect()
            for index in range(len(self.names)):
                self._start_sshd(index)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every node with all that runs on it."""
        for process in self._inits:
            process.kill()
        for process in [*self._inits, *self._daemons]:
            process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """What a user's shell on a node has set."""
        scripts = str(Path(sys.executable).parent)
        kept = ("PYTHONPATH", "TORCH_EXTENSIONS_DIR", "DS_OPTIM_CACHE", "LANG")
        return {
            "HOME": os.environ.get("HOME", "/root"),
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PATH": os.pathsep.join([scripts, _PATH]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def start(
        self, node: int, command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A command on a node, its output in pipes."""
        return subprocess.Popen(
            # Entering a node's mounts loses the working directory.
            [*self._enter(node), "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(cwd), *command],
            env=dict(environment or self.environment()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        node: int,
        command: Sequence[str],
        cwd: Path | None = None,
        timeout: float = 150,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on a node, to its end; its output is one text. What it leaves running is not waited for."""
        process = self.start(node, command, cwd or self.folder, environment)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            process.kill()
            text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            raise AssertionError(f"{' '.join(command)} ran past {timeout:g} s:\n{text[-4000:]}") from None
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    def wire_bytes(self, node: int) -> tuple[int, int]:
        """What the node's interface has received and sent."""
        done = self.run(node, ["cat", "/proc/net/dev"])
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(f"{INTERFACE}:"))
        counters = line.partition(":")[2].split()
        return int(counters[0]), int(counters[8])

    def hostfile(self, slots: int) -> Path:
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def start_slurm(self) -> None:
        """Slurm's controller on the first node, its daemon on each."""
        for index in range(len(self.names)):
            folder = self.folder / self.names[index]
            options = [f"--key-file={self.folder / 'munge.key'}", f"--log-file={folder / 'munge.log'}"]
            options += ["--pid-file=/run/munge/munged.pid", f"--seed-file={folder / 'munge.seed'}"]
            self._daemon(index, ["munged", "--foreground", "--force", *options], "munged")
        for index in range(len(self.names)):
            self._until(index, ["sh", "-c", "munge -n | unmunge >/dev/null"], "munge")
        self._daemon(0, ["slurmctld", "-D", "-i"], "slurmctld")
        for index, name in enumerate(self.names):
            self._daemon(index, ["slurmd", "-D", "-N", name], "slurmd")
        idle = f'[ "$(sinfo -h -t idle -o %D)" = {len(self.names)} ]'
        self._until(0, ["sh", "-c", idle], "Slurm", seconds=60)

    def _enter(self, node: int) -> list[str]:
        return ["nsenter", "-t", str(self._pids[node]), "-n", "-u", "-m", "-i", "-p", "--"]

    def _write_files(self) -> None:
        # The key must be nobody else's; nodes of the cluster are all this user's.
        self.folder.chmod(0o755)
        ssh = self.folder / "ssh"
        ssh.mkdir()
        for name in self.names:
            (self.folder / name).mkdir()
        hosts = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)], check=True, timeout=30
            )
        (ssh / "ssh_config").write_text(
            f"Host *\n  IdentityFile {ssh / 'user_key'}\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (ssh / "sshd_config").write_text(
            f"HostKey {ssh / 'host_key'}\nAuthorizedKeysFile {ssh / 'user_key.pub'}\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin yes\nMaxStartups 100\n"
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs={self._cores} State=UNKNOWN"
            for name, address in zip(self.names, self.addresses, strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            "\n".join(
                [
                    "ClusterName=test",
                    f"SlurmctldHost={self.names[0]}({self.addresses[0]})",
                    "AuthType=auth/munge",
                    "SlurmUser=root",
                    "SlurmdUser=root",
                    "ProctrackType=proctrack/linuxproc",
                    "TaskPlugin=task/none",
                    "JobAcctGatherType=jobacct_gather/none",
                    "MpiDefault=none",
                    "ReturnToService=2",
                    "SelectType=select/cons_tres",
                    "SelectTypeParameters=CR_CPU",
                    "SlurmdParameters=config_overrides",
                    "KillWait=10",
                    "InactiveLimit=0",
                    f"StateSaveLocation={self.folder}/state",
                    f"SlurmdSpoolDir={self.folder}/%n/spool",
                    f"SlurmctldLogFile={self.folder}/slurmctld.log",
                    f"SlurmdLogFile={self.folder}/%n/slurmd.log",
                    "SlurmctldPidFile=/run/slurmctld.pid",
                    "SlurmdPidFile=/run/slurmd.pid",
                    *nodes,
                    "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
                ]
            )
            + "\n"
        )
        (self.folder / "state").mkdir()

    def _start_node(self, name: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, "bash", "-c", _INIT, "init", name, str(self.folder)]
        log = (self.folder / name / "init.log").open("wb")
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PATH": _PATH}
        )
        log.close()
        self._inits.append(process)
        ready = self.folder / name / "ready"
        deadline = time.monotonic() + 20
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(self.folder / name / 'init.log').read_text()}")
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids.append(int(children[0]))

    def _connect(self) -> None:
        """One cable between the nodes, both its ends named alike, as gloo and OpenMPI want it."""
        first, second = self._pids
        subprocess.run(
            [
                *("ip", "link", "add", "name", INTERFACE, "netns", str(first), "type", "veth"),
                *("peer", "name", INTERFACE, "netns", str(second)),
            ],
            check=True,
            timeout=20,
            env={**os.environ, "PATH": _PATH},
            capture_output=True,
        )
        for index, address in enumerate(self.addresses):
            self._must(index, ["ip", "address", "add", f"{address}/24", "dev", INTERFACE])
            self._must(index, ["ip", "link", "set", INTERFACE, "up"])

    def _start_sshd(self, node: int) -> None:
        sshd = shutil.which("sshd", path=_PATH)
        assert sshd is not None
        self._daemon(node, [sshd, "-D", "-e", "-f", str(self.folder / "ssh" / "sshd_config")], "sshd")
        self._until(node, ["ssh", "-o", "ConnectTimeout=2", self.names[node], "true"], "sshd")

    def _daemon(self, node: int, command: Sequence[str], name: str) -> None:
        with (self.folder / self.names[node] / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._enter(node), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.folder,
            )
        self._daemons.append(process)

    def _must(self, node: int, command: Sequence[str]) -> None:
        done = self.run(node, command, timeout=30)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed on {self.names[node]}: {done.stdout}")

    def _until(self, node: int, command: Sequence[str], what: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while (done := self.run(node, command, timeout=30)).returncode != 0:
            if time.monotonic() > deadline:
                logs = [
                    f"{path}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.rglob("*.log"))
                ]
                raise RuntimeError(f"{what} did not start on {self.names[node]}: {done.stdout}\n" + "\n".join(logs))
            time.sleep(0.2)
