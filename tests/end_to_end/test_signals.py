"""Ctrl-C and signals by every launcher, from the first second on: saved, said, status 75; and starts that fail."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_optim.job.exits import PREEMPTED, RANK_LOST
from ds_optim.survival import manifest
from tests.tiers import ALL

from .survival import log_of

pytestmark = pytest.mark.full

LAUNCH = Path(__file__).parents[2] / "launch"
MODEL = "--model model --optimizer lion --stage 1 --dtype fp32 --seq-len 16 --micro-batch 2 --eval-batches 1"
ARGUMENTS = [*MODEL.split(), "--steps", "1000000", "--out", "out"]
PLAIN = [sys.executable, "-m", "ds_optim", "train", *ARGUMENTS]
RANKS = ["--ranks", "2", *ARGUMENTS]
REQUEUED = ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", "ds_optim", "train", *ARGUMENTS]
COMMANDS = {
    "plain": PLAIN,
    "local.sh": ["bash", str(LAUNCH / "local.sh"), *RANKS],
    "torchrun.sh": ["bash", str(LAUNCH / "torchrun.sh"), *RANKS],
    "openmpi.sh": ["bash", str(LAUNCH / "openmpi.sh"), *RANKS],
    "requeue.sh": ["bash", str(LAUNCH / "requeue.sh"), "out", *REQUEUED],
    "requeue.sh of local.sh": ["bash", str(LAUNCH / "requeue.sh"), "out", "bash", str(LAUNCH / "local.sh"), *RANKS],
}
_START_S = 120.0
_OWN_S = 0.7
"""After so long a process is Python's and hears signals, while it imports torch."""


def environment(**more: str) -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **own, "PATH": path, "TERM": "xterm", **more}


class Terminal:
    """A command on a terminal of its own: what it prints, and the keys that are pressed."""

    def __init__(self, command: list[str], place: Path) -> None:
        self.text = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(place)
            os.execvpe(command[0], command, environment())

    def wait_for(self, happened: Callable[[], bool], seconds: float = _START_S) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.text
            self._read()

    def press_interrupt(self) -> None:
        os.write(self._terminal, b"\x03")

    def status(self, seconds: float = 60.0) -> int:
        found: list[int] = []

        def ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            found.extend([os.waitstatus_to_exitcode(status)] if pid else [])
            return bool(found)

        try:
            self.wait_for(ended, seconds)
        finally:
            if not found:
                os.kill(self.pid, signal.SIGKILL)
        return found[0]

    def _read(self) -> None:
        if select.select([self._terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):
                self.text += os.read(self._terminal, 1 << 16).decode(errors="replace")


def with_port(command: list[str]) -> list[str]:
    from ds_optim.machine.forked import free_port

    return [str(free_port()) if word == "PORT" else word for word in command]


def stepping(out: Path) -> bool:
    return (out / "log.jsonl").exists() and len(log_of(out)) > 2


def end_of(out: Path) -> dict[str, Any]:
    end: dict[str, Any] = json.loads((out / "end.json").read_text())
    return end


def nobody_is_left(place: Path) -> bool:
    """Whether no rank of a run in this place lives."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(place) and "ds_optim" in " ".join(process.cmdline()):
                return False
    return True


def named_segments(place: Path) -> list[bool]:
    """Of each segment of DeepSpeed's that a rank in this place has mapped, whether it still has a name in /dev/shm."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == str(place):
                lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                found += [not line.endswith("(deleted)") for line in lines if "/deepspeed_allreduce_buffer" in line]
    return found


def left_lock() -> Path:
    """The lock of a build that was killed, where every later one would wait for ever."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    return folder / "lock"


@pytest.mark.parametrize("how", COMMANDS if ALL else ["plain", "local.sh"])
def test_control_c_on_a_terminal_saves_says_so_and_ends_with_75(place: Path, how: str) -> None:
    if how == "openmpi.sh" and not (shutil.which("mpirun") and has_mpi4py()):
        pytest.skip("needs mpirun and mpi4py")
    lock = left_lock() if how == "plain" else None
    terminal = Terminal(with_port(COMMANDS[how]), place)
    terminal.wait_for(lambda: stepping(place / "out"))
    assert lock is None or not lock.exists()
    # Ranks that have begun need no names in /dev/shm; where ranks are of this machine alone they have the memory.
    assert not any(named := named_segments(place))
    assert named or how == "plain"
    terminal.press_interrupt()
    assert terminal.status() == PREEMPTED, terminal.text
    assert nobody_is_left(place)
    end = end_of(place / "out")
    assert end["status"] == PREEMPTED
    assert (place / f"out/checkpoints/step-{end['step']}" / manifest.NAME).exists()
    assert "saving after this step, then ending with status 75" in terminal.text
    # torchrun shows one of its own for every rank that ends with a status.
    assert "Traceback" not in terminal.text or how == "torchrun.sh"
    assert not (place / "out/stop").exists()
    assert not (place / "out/run.lock").exists()


def test_a_run_that_the_file_stops_is_not_started_again_by_its_script(place: Path) -> None:
    command = [*COMMANDS["local.sh"][:2], "--ranks", "1", *ARGUMENTS]
    script = subprocess.Popen(command, cwd=place, env=environment(), stderr=subprocess.PIPE, text=True)
    while not stepping(place / "out"):
        assert script.poll() is None
        time.sleep(0.05)
    (place / "out/stop").touch()
    _, error = script.communicate(timeout=60)
    assert script.returncode == PREEMPTED, error
    end = end_of(place / "out")
    assert (end["status"], end["again"]) == (PREEMPTED, False)
    assert (place / f"out/checkpoints/step-{end['step']}" / manifest.NAME).exists()
    assert not (place / "out/stop").exists()


def has_mpi4py() -> bool:
    import importlib.util

    return importlib.util.find_spec("mpi4py") is not None


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("requeue.sh", signal.SIGTERM),
        ("requeue.sh of local.sh", signal.SIGTERM),
        ("local.sh", signal.SIGUSR1),
        *([("local.sh", signal.SIGHUP)] if ALL else []),
    ],
)
def test_a_signal_while_ranks_start_is_not_lost(place: Path, how: str, number: signal.Signals) -> None:
    script = subprocess.Popen(
        with_port(COMMANDS[how]),
        cwd=place,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    time.sleep(2.0)
    assert not (place / "out/log.jsonl").exists()
    script.send_signal(number)
    _, error = script.communicate(timeout=60)
    assert script.returncode == PREEMPTED, error
    assert f"{number.name}: the ranks save and end" in error
    assert "try 2" not in error
    assert "Traceback" not in error
    assert nobody_is_left(place)
    assert not stepping(place / "out")


def rank_alone(place: Path, out: str, port: str, rank: int = 0, **more: str) -> subprocess.Popen[str]:
    """One of two ranks, started as a launcher does that this process is."""
    given = {"RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": f"{rank}", "LOCAL_SIZE": "2"}
    variables = environment(**{**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more})
    return subprocess.Popen([*PLAIN[:-1], out], cwd=place, env=variables, stderr=subprocess.PIPE, text=True)


def ended(run: subprocess.Popen[str], status: int, out: Path) -> str:
    """What a rank said that ended with a status, which its folder has too."""
    _, error = run.communicate(timeout=60)
    assert run.returncode == status, error
    assert end_of(out)["status"] == status
    assert "Traceback" not in error
    return error


def test_ranks_that_do_not_find_each_other_end_with_a_line(place: Path) -> None:
    """One waits until its limit; others are told to end in their first moments, and where no Python runs."""
    port = with_port(["PORT"])[0]
    told = rank_alone(place, "told", port, DS_OPTIM_JOIN_TIMEOUT="100", LOCAL_SIZE="1")
    early = rank_alone(place, "early", with_port(["PORT"])[0], LOCAL_SIZE="1")
    time.sleep(_OWN_S)
    early.send_signal(signal.SIGTERM)
    late = rank_alone(place, "late", with_port(["PORT"])[0], DS_OPTIM_JOIN_TIMEOUT="1")
    line = r"^ds-optim: error: rank 0 of 2 on \S+ waited 1 s for rank 1 to join: see which of them did not start"
    assert re.search(line, ended(late, RANK_LOST, place / "late"), re.M)
    nothing = "ds-optim: SIGTERM before the ranks had joined: nothing was begun"
    assert nothing in ended(early, PREEMPTED, place / "early")
    told.send_signal(signal.SIGTERM)
    assert nothing in ended(told, PREEMPTED, place / "told")


def test_a_launcher_that_lost_a_rank_is_told_from_one_that_was_told_to_end(place: Path) -> None:
    """Both end the ranks one after the other, with SIGTERM, before they have met."""
    port = with_port(["PORT"])[0]
    left, lost = (rank_alone(place, "lost", port, rank) for rank in range(2))
    time.sleep(_OWN_S)
    lost.kill()
    lost.wait()
    left.send_signal(signal.SIGTERM)
    line = "ds-optim: error: rank 1 ended before the ranks had joined, and the launcher ended this one"
    assert line in ended(left, RANK_LOST, place / "lost")
    first, second = (rank_alone(place, "told", port, rank) for rank in range(2))
    time.sleep(_OWN_S)
    for run in (first, second):
        run.send_signal(signal.SIGTERM)
        assert "SIGTERM before the ranks had joined: nothing was begun" in ended(run, PREEMPTED, place / "told")


@pytest.mark.parametrize("how", ["deepspeed", *(["torchrun"] if ALL else [])])
def test_a_rank_killed_before_it_joins_is_named_under_the_launcher_itself(place: Path, how: str) -> None:
    launchers = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "-m"],
    }
    command = with_port([*launchers[how], "ds_optim", "train", *ARGUMENTS])
    run = subprocess.Popen(command, cwd=place, env=environment(), stderr=subprocess.PIPE, text=True)
    killed: list[int] = []
    while not killed and run.poll() is None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(place) and process.environ().get("RANK") == "1":
                    process.kill()
                    killed.append(process.pid)
        time.sleep(0.05)
    _, error = run.communicate(timeout=60)
    end = end_of(place / "out")
    assert (end["status"], end["again"]) == (RANK_LOST, True)
    assert end["line"] == "rank 1 ended before the ranks had joined, and the launcher ended this one"
    assert f"ds-optim: error: {end['line']}" in error
    assert nobody_is_left(place)
