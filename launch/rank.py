"""One rank, as every script of this folder starts it: ``rank.py TOKEN COMMAND ARGUMENTS...``.

Tells torch which rank this is where only Slurm or MPI did, tags what the rank prints with its number and node, and
becomes ``python -m ds_optim COMMAND``: same process, so that signals and the exit status are the rank's own. Needs
nothing but the standard library, so that it can say which package a node lacks.
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import signal
import socket
import sys
from collections.abc import MutableMapping

NEEDED = ("torch", "deepspeed", "transformers", "datasets", "ds_optim")
#: Which variables say rank, local rank, ranks and ranks of this node, by who sets them.
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def main(arguments: list[str]) -> None:
    token, command, *rest = arguments
    name_rank(os.environ)
    tag_output(f"[rank {rank_of(os.environ)} {socket.gethostname()}] ")
    missing = [package for package in NEEDED if not installed(package)]
    if missing:
        sys.exit(mistake(f"{sys.executable} has no {', '.join(missing)}: install it on {socket.gethostname()} too"))
    module = ["ds_optim.sweep.worker"] if command == "cell" else ["ds_optim", command]
    # None may come before it can be handled: they wait, across exec, until ds_optim.survival.preemption hears them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    # -X is where a process can carry a name that pkill finds and that Python ignores.
    os.execv(sys.executable, [sys.executable, "-X", f"ds_optim_run={token}", "-u", "-m", *module, *rest])


def installed(package: str) -> bool:
    # A folder that has only the package's name has no origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def name_rank(environment: MutableMapping[str, str]) -> None:
    """Set RANK and its like where ``srun`` started this; under MPI, DeepSpeed asks mpi4py for them itself."""
    if "RANK" in environment:
        environment.setdefault("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", "1"))
    elif OPENMPI[0] in environment:
        environment.setdefault("LOCAL_SIZE", environment[OPENMPI[3]])
    elif SLURM[0] in environment:
        for name, source in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), SLURM, strict=True):
            environment[name] = environment[source]
        environment["LOCAL_SIZE"] = tasks_here(environment)


def tasks_here(environment: MutableMapping[str, str]) -> str:
    """Ranks of this node, out of Slurm's ``2(x3),1``: two on each of the first three nodes, one on the fourth."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.removesuffix(")") or 1)
    return counts[int(environment.get("SLURM_NODEID", "0")) % len(counts)]


def rank_of(environment: MutableMapping[str, str]) -> str:
    return environment.get("RANK") or environment.get(OPENMPI[0]) or "0"


def mistake(line: str) -> int:
    print(f"ds-optim: error: {line}", file=sys.stderr, flush=True)
    return 2


def tag_output(tag: str) -> None:
    """Put ``tag`` before every line of this process's stdout and stderr, of all that it starts and becomes."""
    out, err = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        # Twice forked: the rank must not find a child that it did not start.
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.close(out[1])
            os.close(err[1])
            pump({out[0]: 1, err[0]: 2}, tag.encode())
        os._exit(0)
    os.waitpid(child, 0)
    for (read, write), descriptor in ((out, 1), (err, 2)):
        os.close(read)
        os.dup2(write, descriptor)
        os.close(write)


def pump(pipes: dict[int, int], tag: bytes) -> None:
    """Copy lines from each pipe to its descriptor until all are closed."""
    rests = dict.fromkeys(pipes, b"")
    selector = selectors.DefaultSelector()
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)
    while rests:
        for key, _ in selector.select():
            chunk = os.read(key.fd, 1 << 16)
            *lines, rest = (rests[key.fd] + chunk).split(b"\n")
            if not chunk:
                selector.unregister(key.fd)
                del rests[key.fd]
                lines = [rest] if rest else []
            else:
                rests[key.fd] = rest
            for line in lines:
                write(pipes[key.fd], tag + line + b"\n")


def write(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:  # nobody reads any more: the rank goes on
            return


if __name__ == "__main__":
    main(sys.argv[1:])
