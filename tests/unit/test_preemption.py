"""What a signal does to a rank: the first asks, the same again ends, one that a script repeats never does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
