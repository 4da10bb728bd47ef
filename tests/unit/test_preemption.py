"""What a signal does to a rank: the first asks, the same again ends, one that a script repeats never does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_optim.job import exits as ends
from ds_optim.machine.held import is_training
from ds_optim.survival.preemption import STOP_NAME, Preemption

pytestmark = pytest.mark.full

RANK = """
import sys, time
from pathlib import Path
from ds_optim.survival.preemption import Preemption
with Preemption() as preemption:
    preemption.joined(None, first=True)
    print("ready", flush=True)
    while not preemption.asked:
        time.sleep(0.05)
    print("asked", flush=True)
    time.sleep(float(sys.argv[1]))
    preemption.over = True
    print("over", flush=True)
    time.sleep(1.0)
sys.exit(75)
"""


def signalled(saves_s: float, *signals: signal.Signals) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(saves_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    assert process.stdout.readline() == "asked\n"
    time.sleep(1.2)
    process.send_signal(signals[-1])
    output, error = process.communicate(timeout=30)
    return process.returncode, output, error


def test_a_second_interrupt_ends_at_once() -> None:
    # What a launcher passes on of the same Ctrl-C is the same request.
    status, output, error = signalled(60.0, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    assert (status, output) == (128 + signal.SIGINT, "")
    first, second = error.splitlines()
    assert first == (
        "ds-optim: SIGINT: saving after this step, then ending with status 75; the same again ends at once"
    )
    assert second == "ds-optim: SIGINT again: ended at once; earlier checkpoints are as they were"


@pytest.mark.parametrize(("number", "saves_s"), [(signal.SIGUSR1, 2.0), (signal.SIGTERM, 0.5)])
def test_a_repeated_request_or_one_after_the_save_changes_nothing(number: signal.Signals, saves_s: float) -> None:
    status, output, error = signalled(saves_s, number)
    assert (status, output) == (75, "over\n")
    assert len(error.splitlines()) == 1


ENDS = RANK.replace("Preemption()", "Preemption(last=True)").replace(
    "sys.exit(75)", 'print("after", flush=True)\ntime.sleep(2.0)\nsys.exit(75)'
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_process_that_has_only_to_end_leaves_its_status(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDS, "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert [process.stdout.readline() for _ in range(3)] == ["asked\n", "over\n", "after\n"]
    process.send_signal(number)
    assert process.wait(30) == 75


def test_a_file_asks_too_and_one_of_before_does_not(tmp_path: Path) -> None:
    (tmp_path / STOP_NAME).touch()
    with Preemption() as preemption:
        preemption.joined(tmp_path, first=True)
        assert not (tmp_path / STOP_NAME).exists()
        assert preemption.wanted() == 0.0
        (tmp_path / STOP_NAME).touch()
        time.sleep(0.6)
        assert preemption.wanted() == 1.0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def ended(out: Path, status: int) -> str:
    out.mkdir(exist_ok=True)
    ends.note_end(out, status, 7, "of before")
    return (out / ends.END_NAME).read_text()


def test_a_start_that_never_began_hides_no_earlier_end(tmp_path: Path) -> None:
    """What it notes decides whether a script starts again, and whether that one replaces what is there."""
    for status in (ends.FINISHED, ends.BAD_NUMBERS, ends.SAVE_FAILED):
        before = ended(tmp_path / f"{status}", status)
        ends.note_unbegun(tmp_path / f"{status}", ends.PREEMPTED, "told")
        assert (tmp_path / f"{status}" / ends.END_NAME).read_text() == before
    for status in (ends.PREEMPTED, ends.RANK_LOST):
        ended(tmp_path / f"{status}", status)
        ends.note_unbegun(tmp_path / f"{status}", ends.RANK_LOST, "lost")
        assert ends.read_end(tmp_path / f"{status}") == ends.End(status=69, step=7, line="lost", again=True)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "log.jsonl").touch()
    ends.note_unbegun(killed, ends.PREEMPTED, "told")
    assert not (killed / ends.END_NAME).exists()
    (killed / "checkpoints/step-3").mkdir(parents=True)
    (killed / "checkpoints/step-3/manifest.json").touch()
    for out in (killed, tmp_path / "new"):
        ends.note_unbegun(out, ends.PREEMPTED, "told")
        assert ends.read_end(out) == ends.End(status=75, step=0, line="told", again=True)
    assert ends.read_end(killed, since=time.time() + 60) is None
    (killed / ends.END_NAME).write_text("[]")
    assert ends.read_end(killed) is None


SIBLING = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("names", "gone"),
    [
        (("RANK", "LOCAL_RANK", "LOCAL_SIZE"), [5]),
        (("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), [5]),
        (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"), [5]),
        # Slurm numbers the ranks of a node as it likes.
        (("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"), []),
    ],
)
def test_ranks_of_a_node_that_ended_are_known_by_those_that_live(names: tuple[str, ...], gone: list[int]) -> None:
    """Ranks 4 and 6 of a node that has 4, 5 and 6; what else runs beside them counts for nothing."""
    ask = "import os; from ds_optim.machine import siblings; print(siblings.gone(os.environ))"
    runs = []
    for rank, code in ((6, SIBLING), (None, SIBLING), (4, ask)):
        own = {} if rank is None else dict(zip(names, (f"{rank}", f"{rank - 4}", "3"), strict=True))
        variables = {**{name: value for name, value in os.environ.items() if name not in names}, **own}
        run = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
        runs.append(run)
        if code == SIBLING:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
    try:
        assert runs[-1].stdout is not None
        assert runs[-1].stdout.readline() == f"{gone}\n"
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.mark.parametrize(
    ("words", "held"),
    [
        (["-m", "ds_optim", "train"], True),
        (["-m", "ds_optim", "--local_rank=1", "--plugin", "x.py", "train"], True),
        (["-m", "ds_optim", "doctor"], False),
        (["-m", "mine", "train"], False),
        (["mine.py", "-m", "ds_optim", "train"], False),
        (["/usr/bin/ds-optim", "train"], True),
    ],
)
def test_signals_wait_for_torch_in_the_training_command_alone(
    monkeypatch: pytest.MonkeyPatch, words: list[str], held: bool
) -> None:
    # While a package is imported for -m, Python has -m in the place of the file.
    started = ["-m", *words[2:]] if words[0] == "-m" else words
    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *words])
    assert is_training() is held


FINISHES = """
import atexit
from ds_optim.machine import ranks
class Left:
    def __del__(self):
        print("torn down")
left = Left()
atexit.register(print, "what was registered")
ranks.world_size = lambda: {size}
ranks.end_together(74)
"""


@pytest.mark.parametrize(
    ("size", "status", "said"), [(2, 74, "what was registered\n"), (1, 0, "what was registered\ntorn down\n")]
)
def test_one_of_several_ranks_ends_without_being_torn_down(size: int, status: int, said: str) -> None:
    # Torn down with gloo's threads alive, a process aborts now and then after its work was done.
    done = subprocess.run([sys.executable, "-c", FINISHES.format(size=size)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, said), done.stderr
