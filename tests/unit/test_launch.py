"""The launch scripts with stand-ins for the launchers: commands, what goes along, signals, and starting again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

#: Counts its starts, notes its arguments, and ends with the next of STATUSES.
STAND_IN = """#!/bin/bash
echo "$@" >>"$NOTES/arguments"
count=$(wc -l <"$NOTES/arguments")
[ -z "$DS_ENV_FILE" ] || cp "$DS_ENV_FILE" "$NOTES/environment"
statuses=($STATUSES)
mkdir -p "$NOTES/out/checkpoints/step-2" && touch "$NOTES/out/checkpoints/step-2/manifest.json"
exit "${statuses[count - 1]}"
"""
#: A launcher whose rank saves, for SAVES_S, when it is told to end.
SAVES = """#!/bin/bash
python -X "ds_optim_run=$DS_OPTIM_RUN" -c '
import os, pathlib, signal, sys, time
def save(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(float(os.environ["SAVES_S"]))
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)' "$NOTES"
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    bin_folder = tmp_path / "bin"
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    return {**kept, "PATH": f"{bin_folder}{os.pathsep}{PATH}", "NOTES": str(tmp_path), "DS_ACCELERATOR": "cpu", **more}


def stand_in(tmp_path: Path, name: str, text: str = STAND_IN) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    path = tmp_path / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def launch(tmp_path: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def hostfile(tmp_path: Path, text: str = "node1 slots=2\nnode2 slots=2\n") -> str:
    (tmp_path / "hosts").write_text(text)
    return str(tmp_path / "hosts")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    for name in ("deepspeed", "pdsh", "mpirun", "torchrun", "srun", "ssh"):
        stand_in(tmp_path, name)
    for name in ("scontrol", "scancel", "squeue"):
        stand_in(tmp_path, name, "#!/bin/bash\n")
    return tmp_path


def test_dry_runs_print_the_command_and_start_nothing(tools: Path) -> None:
    def dry(script: str, *arguments: str, **more: str) -> str:
        done = launch(tools, script, *arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    rank = rf"{re.escape(str(LAUNCH))}/rank\.py \S+ train --stage 2"
    local = dry("local.sh", "--ranks", "2", "--port", "15001", "--dry-run", "--stage", "2")
    assert re.search(rf"deepspeed --num_gpus 2 --master_port 15001 --no_local_rank {rank}\n", local)
    hosts = hostfile(tools)
    pdsh = dry(
        "hostfile.sh", f"--hostfile={hosts}", "--dry-run", "--port=15001", "--stage", "2", GLOO_SOCKET_IFNAME="e0"
    )
    assert "# environment: GLOO_SOCKET_IFNAME=e0\n" in pdsh
    assert re.search(rf"deepspeed --hostfile {hosts} .*--master_port 15001 {rank}\n", pdsh)
    torchrun = dry("torchrun.sh", "--nodes", "2", "--ranks", "4", "--rendezvous", "a:1", "--dry-run", "--stage", "2")
    assert re.search(rf"--nnodes 2 --nproc-per-node 4 .*--rdzv-endpoint a:1 .*{rank}\n", torchrun)
    srun = dry("slurm.sbatch", "--dry-run", "--stage", "2", SLURM_NTASKS="4")
    assert re.search(rf"MASTER_PORT=\d+ srun --ntasks=4 .*{rank}\n", srun)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "2"}
    inside = dry("torchrun.sh", "--dry-run", "--stage", "2", **job)
    assert "--nnodes 2" in inside
    assert "--rdzv-id 7 " in inside
    compare = dry("hostfile.sh", "--hostfile", hosts, "--dry-run", "compare", "--stages", "1")
    assert f"hostfile.sh\\ --hostfile\\ {hosts}\\ cell" in compare
    assert "-m ds_optim compare --ranks 4 --stages 1" in compare
    assert not (tools / "arguments").exists()


def test_openmpi_names_what_goes_along(tools: Path) -> None:
    (tools / "mpi4py").mkdir()
    (tools / "mpi4py" / "__init__.py").touch()
    path = os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    more = {"PYTHONPATH": path, "NCCL_DEBUG": "WARN", "MY_FLAG": "1", "DS_OPTIM_FORWARD": "MY_FLAG", "OTHER": "1"}
    done = launch(tools, "openmpi.sh", "--hostfile", hostfile(tools), "--interface", "e0", "--dry-run", **more)
    assert done.returncode == 0, done.stderr
    assert "mpirun -np 4 " in done.stdout
    for name in ("MASTER_PORT", "NCCL_DEBUG", "MY_FLAG", "PATH", "PYTHONPATH"):
        assert f" -x {name} " in done.stdout
    assert "-x OTHER" not in done.stdout
    assert "--mca oob_tcp_if_include e0 --mca btl_tcp_if_include e0" in done.stdout


def test_the_environment_of_a_hostfile_run(tools: Path) -> None:
    (tools / ".deepspeed_env").write_text("MINE=1\n\n# a comment\n")
    more = {"NCCL_DEBUG": "WARN", "TORCH_BAD": 'a "b"', "HOME": str(tools / "nowhere"), "STATUSES": "0 0 0 0"}
    done = launch(tools, "hostfile.sh", "--hostfile", hostfile(tools), "--stage", "2", **more)
    assert done.returncode == 0, done.stderr
    lines = (tools / "environment").read_text().splitlines()
    assert {"MINE=1", "NCCL_DEBUG=WARN", "DS_ACCELERATOR=cpu"} <= set(lines)
    assert all(re.fullmatch(r"\w+=.+", line) for line in lines)
    assert "not forwarded: TORCH_BAD" in done.stderr


def test_words_reach_a_remote_shell_whole(tools: Path) -> None:
    words = ["--optimizer-params", '{"lr": 0.1}', '{"lr":1}', "it's 5 % of $HOME", "plain", "a\\b c"]
    done = launch(tools, "hostfile.sh", "--hostfile", hostfile(tools), "--dry-run", "train", *words)
    printed = done.stdout.splitlines()[-1]
    # The dry run shows the command for this shell; a node's shell then reads what pdsh passes on.
    local = subprocess.run(
        ["bash", "-c", f'set -- {printed}; printf "%s\\n" "$*"'], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    remote = local.partition(" train ")[2].replace("%%", "%")
    back = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {remote}"], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    assert back.splitlines() == words


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("hostfile.sh", [], "no hostfile: give --hostfile FILE"),
        ("hostfile.sh", ["--hostfile", "nowhere"], "no such hostfile: nowhere"),
        ("local.sh", ["trian"], "unknown option or command trian"),
        ("local.sh", ["--port", "x"], "--port x: write a whole number from 1 to 65535"),
        ("local.sh", ["--port", "65536"], "--port 65536: write a whole number from 1 to 65535"),
        ("local.sh", ["--tries", "0"], "--tries 0: write a whole number from 1"),
        ("local.sh", ["--ranks", "two"], "--ranks two: write a whole number from 1"),
        ("local.sh", ["--ranks", "0", "compare"], "--ranks 0: write a whole number from 1"),
        ("torchrun.sh", ["--ranks", "-1"], "--ranks -1: write a whole number from 1"),
        ("torchrun.sh", ["--nodes", "2.0"], "--nodes 2.0: write a whole number from 1"),
        ("torchrun.sh", ["--rendezvous", "a:b"], "--rendezvous a:b: write HOST:PORT"),
        ("openmpi.sh", ["--ranks", "1e3"], "--ranks 1e3: write a whole number from 1"),
        ("requeue.sh", ["out"], "usage: bash launch/requeue.sh OUT COMMAND..."),
        ("slurm.sbatch", [], "no Slurm job: start it with sbatch"),
        ("torchrun.sh", ["--nodes", "2"], "2 nodes need --rendezvous HOST:PORT"),
        ("openmpi.sh", [], "no hostfile"),
    ],
)
def test_mistakes_are_one_line(tools: Path, script: str, arguments: list[str], line: str) -> None:
    done = launch(tools, script, *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


#: A machine with two GPUs.
TWO_GPUS = "#!/bin/bash\nprintf 'GPU 0: one\\nGPU 1: two\\n'\n"


@pytest.mark.parametrize(
    ("script", "arguments", "more", "line"),
    [
        ("local.sh", ["--ranks", "3"], {}, "3 ranks need as many GPUs, and this machine has 2: start 2 or fewer"),
        ("local.sh", ["--ranks", "2"], {"CUDA_VISIBLE_DEVICES": "1"}, "and this machine has 1: start 1 or fewer"),
        ("torchrun.sh", ["--ranks", "8"], {}, "8 ranks need as many GPUs, and this machine has 2"),
        ("openmpi.sh", ["--ranks", "4"], {}, "4 ranks need as many GPUs, and this machine has 2"),
        (
            "slurm.sbatch",
            [],
            {"SLURM_TASKS_PER_NODE": "2,9(x3)", "SLURM_GPUS_ON_NODE": "8"},
            "9 ranks need as many GPUs, and a node of this job has 8",
        ),
    ],
)
def test_more_ranks_than_gpus_are_one_line(
    tools: Path, script: str, arguments: list[str], more: dict[str, str], line: str
) -> None:
    stand_in(tools, "nvidia-smi", TWO_GPUS)
    done = launch(tools, script, *arguments, "--dry-run", DS_ACCELERATOR="", **more)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert launch(tools, script, *arguments, "--dry-run", DS_ACCELERATOR="cpu", **more).returncode == 0


def test_ranks_are_the_gpus_that_may_be_seen(tools: Path) -> None:
    stand_in(tools, "nvidia-smi", TWO_GPUS)
    for visible, gpus in (({}, 2), ({"CUDA_VISIBLE_DEVICES": "1"}, 1)):
        done = launch(tools, "local.sh", "--dry-run", DS_ACCELERATOR="", **visible)
        assert f"--num_gpus {gpus} " in done.stdout, done.stderr


TOOLS = [
    *("awk", "basename", "bash", "cat", "date", "dirname", "env", "grep", "head", "hostname", "id", "mktemp"),
    *("realpath", "rm", "sed", "sort", "tail", "tr", "uniq"),
]


@pytest.mark.full
def test_dry_runs_need_no_launcher_and_no_job(tmp_path: Path) -> None:
    """With nothing on PATH but the shell's tools, Python and its packages."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    hosts = hostfile(tmp_path)
    calls = [("hostfile.sh", "--hostfile", hosts), ("openmpi.sh", "--hostfile", hosts), ("slurm.sbatch",)]
    calls += [("slurm.sbatch", "--launcher", "slurm"), ("local.sh",), ("torchrun.sh",)]
    for script, *arguments in calls:
        more = {"PATH": str(tmp_path / "bin"), "PYTHON": sys.executable}
        done = launch(tmp_path, script, *arguments, "--dry-run", "--stage", "2", **more)
        assert (done.returncode, done.stderr) == (0, ""), script
        assert done.stdout.rstrip().endswith("train --stage 2"), script


SCRIPTS = {path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")} - {"common.sh", "setup_env.sh"}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_does_nothing_else(tmp_path: Path, script: str) -> None:
    stand_in(tmp_path, "pip", "#!/bin/bash\ntouch $NOTES/installed\n")
    done = launch(tmp_path, script, "--help", PYTHON="/nowhere/python", DS_OPTIM_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert f"launch/{script}" in done.stdout
    assert done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("node1 slots=2\nnode1 slots=2\n", "names node1 twice"),
        ("node1\n", "line 1: 'node1' is not 'NAME slots=N'"),
        ("node1 slots=2\nnode2 slots=0\n", "line 2"),
        ("# none\n", "names no host"),
        ("node1 Slots=2\n", "line 1"),
        ("node1 slots=2 lots=3\n", "line 1"),
    ],
)
def test_wrong_hostfiles(tools: Path, text: str, line: str) -> None:
    done = launch(tools, "hostfile.sh", "--hostfile", hostfile(tools, text))
    assert done.returncode == 2
    assert line in done.stderr


def test_slots_are_counted_beside_what_openmpi_and_deepspeed_read(tools: Path) -> None:
    text = "# three\r\nme@node1 slots=2 max_slots=4\r\n\r\nnode2\tslots=1 # slots=7\r\n"
    done = launch(tools, "hostfile.sh", "--hostfile", hostfile(tools, text), "--dry-run", "compare")
    assert "-m ds_optim compare --ranks 3\n" in done.stdout, done.stderr


def test_unreachable_hosts_are_named_before_anything_starts(tools: Path) -> None:
    stand_in(tools, "ssh", '#!/bin/bash\n[[ " $* " != *" node2 "* ]]\n')
    done = launch(tools, "hostfile.sh", "--hostfile", hostfile(tools), STATUSES="0 0")
    assert done.returncode == 2
    assert "node2 cannot be reached: 'ssh node2 true' must work" in done.stderr
    assert "node1 cannot" not in done.stderr
    assert not (tools / "arguments").exists()


def test_starts_again_after_a_preemption_and_a_lost_rank(tools: Path) -> None:
    done = launch(tools, "local.sh", "--ranks", "2", "--steps", "9", "--out", "out", STATUSES="75 69 0")
    assert done.returncode == 0, done.stderr
    first, second, third = (tools / "arguments").read_text().splitlines()
    assert "--resume" not in first
    assert second.endswith("--out out --resume")
    assert third.endswith("--out out --resume")


def test_other_statuses_and_the_last_try_end_it(tools: Path) -> None:
    assert launch(tools, "local.sh", "--out", "out", STATUSES="2").returncode == 2
    assert len((tools / "arguments").read_text().splitlines()) == 1
    (tools / "arguments").unlink()
    assert launch(tools, "local.sh", "--tries", "2", "--out", "out", STATUSES="75 75 0").returncode == 75
    assert len((tools / "arguments").read_text().splitlines()) == 2


def test_the_status_that_a_run_noted_wins(tools: Path) -> None:
    noting = STAND_IN.replace("exit ", """echo '{"status": 75, "step": 3}' >"$NOTES/out/end.json"\nexit """)
    stand_in(tools, "torchrun", noting)
    done = launch(tools, "torchrun.sh", "--tries", "3", "--out", "out", STATUSES="1 1 0")
    assert done.returncode == 0, done.stderr
    assert len((tools / "arguments").read_text().splitlines()) == 3


def test_a_run_that_left_no_checkpoint_is_begun_anew(tools: Path) -> None:
    stand_in(tools, "deepspeed", STAND_IN.replace("&& touch", '&& echo {} >"$NOTES/out/settings.json" || touch'))
    assert launch(tools, "local.sh", "--steps", "9", "--out", "out", STATUSES="69 0").returncode == 0
    first, second = (tools / "arguments").read_text().splitlines()
    assert first.endswith("--out out")
    assert second.endswith("--out out --force")


#: As the deepspeed launcher ends when it lost a rank: with the signal's number, before any rank could note it.
KILLED = """#!/bin/bash
echo "$@" >>"$NOTES/arguments"
(($(wc -l <"$NOTES/arguments") > 1)) || exit 247
"""


def test_a_rank_killed_before_anything_was_noted_is_a_lost_rank(tools: Path) -> None:
    stand_in(tools, "deepspeed", KILLED)
    (tools / "out").mkdir()
    done = launch(tools, "local.sh", "--steps", "9", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "ended with status 69, try 1 of 10" in done.stderr
    first, second = (tools / "arguments").read_text().splitlines()
    assert first.endswith("--out out")
    assert second == first, "nothing was begun that --force would replace"
    # doctor's ranks leave nothing to go on with.
    (tools / "arguments").unlink()
    assert launch(tools, "local.sh", "doctor").returncode == 247


def test_what_an_earlier_run_left_is_not_replaced_for_a_rank_that_was_lost(tools: Path) -> None:
    """Neither is the end of a run that came to its end taken for this one's, nor is its log forced away."""
    stand_in(tools, "deepspeed", KILLED)
    (tools / "out").mkdir()
    (tools / "out/end.json").write_text('{"status": 0, "step": 9, "line": "", "again": true}\n')
    (tools / "out/settings.json").write_text("{}")
    assert launch(tools, "local.sh", "--steps", "9", "--out", "out").returncode == 0
    assert "--force" not in (tools / "arguments").read_text()
    # What its own first start began may be.
    (tools / "arguments").unlink()
    stand_in(tools, "deepspeed", KILLED.replace("(($(wc", 'echo "{}" >>"$NOTES/out/settings.json"\n(($(wc'))
    assert launch(tools, "local.sh", "--steps", "9", "--out", "out").returncode == 0
    first, second = (tools / "arguments").read_text().splitlines()
    assert "--force" not in first
    assert second.endswith("--out out --force")


def test_a_mistake_of_one_rank_is_no_lost_rank_for_those_that_note_it_as_one(tools: Path) -> None:
    stand_in(tools, "deepspeed", STAND_IN.replace("exit ", """echo '{"status": 69}' >"$NOTES/out/end.json"\nexit """))
    assert launch(tools, "local.sh", "--out", "out", STATUSES="2 0").returncode == 2
    assert len((tools / "arguments").read_text().splitlines()) == 1


def test_an_end_of_before_is_not_the_end_of_a_start_that_is_refused(tools: Path) -> None:
    (tools / "out").mkdir()
    (tools / "out/end.json").write_text('{"status": 75, "step": 3, "line": "", "again": true}\n')
    before = (tools / "out/end.json").stat().st_mtime_ns
    assert launch(tools, "local.sh", "--out", "out", STATUSES="2 0").returncode == 2
    assert (tools / "out/end.json").stat().st_mtime_ns == before
    assert len((tools / "arguments").read_text().splitlines()) == 1


def test_a_time_limit_is_for_who_started_the_script(tools: Path) -> None:
    noting = """echo '{"status": 75, "step": 3, "line": "", "again": false}' >"$NOTES/out/end.json"\nexit """
    stand_in(tools, "deepspeed", STAND_IN.replace("exit ", noting))
    assert launch(tools, "local.sh", "--out", "out", STATUSES="75 0").returncode == 75
    assert len((tools / "arguments").read_text().splitlines()) == 1


def signalled(tools: Path, *signals: signal.Signals, saves_s: float = 0.0, apart_s: float = 0.0) -> tuple[int, str]:
    """What local.sh ended with, and said, that was sent these when its rank was ready."""
    stand_in(tools, "deepspeed", SAVES)
    more = {"DS_OPTIM_RUN": f"test-{os.getpid()}-{time.monotonic_ns()}", "SAVES_S": f"{saves_s}"}
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--out", "out"],
        cwd=tools,
        env=environment(tools, **more),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tools / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        script.send_signal(number)
        time.sleep(apart_s)
    _, error = script.communicate(timeout=40)
    return script.returncode, error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_rank_and_end_the_script(tools: Path, number: signal.Signals) -> None:
    status, error = signalled(tools, number)
    assert status == 75, error
    assert "ended with status 75, try 1" in error


@pytest.mark.parametrize(
    ("signals", "apart_s", "saved"),
    [
        # A terminal that closes, and a service manager.
        ((signal.SIGHUP, signal.SIGHUP), 0.05, True),
        ((signal.SIGTERM, signal.SIGHUP), 0.05, True),
        # One that a batch system repeats.
        ((signal.SIGUSR1, signal.SIGUSR1), 1.2, True),
        ((signal.SIGTERM, signal.SIGTERM), 1.2, False),
        ((signal.SIGQUIT,), 0.0, False),
        ((signal.SIGHUP, signal.SIGQUIT), 0.05, False),
    ],
)
def test_a_request_that_comes_twice_and_one_that_insists(
    tools: Path, signals: tuple[signal.Signals, ...], apart_s: float, saved: bool
) -> None:
    begun = time.monotonic()
    status, error = signalled(tools, *signals, saves_s=2.5 if saved else 60.0, apart_s=apart_s)
    assert status == (75 if saved else 69), error
    assert ("the ranks are ended at once" in error) is not saved
    assert time.monotonic() - begun < 30
    assert (tools / "saved").exists() is saved


def test_a_rank_is_named_by_slurm_and_tags_what_it_prints(tmp_path: Path) -> None:
    for package in ("torch", "deepspeed", "transformers", "datasets", "ds_optim"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    (tmp_path / "ds_optim" / "__main__.py").write_text(
        f"import os, sys\nprint(*(os.environ[n] for n in {names!r}), sys.argv[1:])\n"
        "print('last', end='', file=sys.stderr)\nsys.exit(75)\n"
    )
    variables = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "5", "SLURM_NODEID": "1"}
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "rank.py"), "token", "train", "--x", "a b"],
        cwd=tmp_path,
        env={"PATH": PATH, "PYTHONPATH": str(tmp_path), "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75
    assert re.fullmatch(r"\[rank 3 \S+\] 3 1 5 2 \['train', '--x', 'a b'\]\n", done.stdout)
    assert re.fullmatch(r"\[rank 3 \S+\] last\n", done.stderr)


def test_a_missing_package_is_named_with_the_node(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(LAUNCH / "rank.py"), "token", "train"],
        env={"PATH": PATH},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"ds-optim: error: \S+ has no torch, deepspeed, .*: install it on \S+ too", done.stderr)
