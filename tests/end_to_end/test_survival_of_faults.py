"""What ends a run early, and how: signals, lost ranks, bad numbers; under the launcher, and a little chaos."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_optim.job.exits import BAD_NUMBERS, PREEMPTED, RANK_LOST, BadNumbers
from ds_optim.job.results import TrainResult
from ds_optim.job.settings import make_settings
from ds_optim.survival import manifest
from ds_optim.train.loop import train
from tests.distributed.harness import run_ranks
from tests.tiers import ALL

from .survival import STEPS, Watcher, log_of, tiny
from .test_train import command, launched

pytestmark = pytest.mark.full

# ---- signals


def preempted(rank: int, world_size: int, folder: Path) -> list[TrainResult]:
    """A whole run, one that a signal to rank 1 alone ends after step 2, and the rest of it."""
    os.chdir(folder)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def ask(engine: Any, step: int) -> None:
        # In step 3: the border after it is where all ranks agree.
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    runs = [train(make_settings(**tiny()))]
    runs.append(train(make_settings(**tiny(out="out")), Watcher(ask)))
    runs.append(train(make_settings(**tiny(out="out", resume=True))))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return runs


def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_as_if_nothing_was(place: Path) -> None:
    for whole, cut, rest in run_ranks(2, preempted, place):
        assert (whole.status, cut.status, rest.status) == (0, PREEMPTED, 0)
        assert cut.steps == 3
        assert cut.losses + rest.losses == whole.losses
        assert rest.val_loss == whole.val_loss
    assert json.loads((place / "out/end.json").read_text())["status"] == 0


# ---- a rank that is lost


def lose_a_rank(rank: int, world_size: int, folder: Path, how: str) -> None:
    """Rank 1 is lost after step 2: it dies, sleeps, or fails by itself."""
    os.chdir(folder)

    def lose(engine: Any, step: int) -> None:
        if rank == 1 and step == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(600)
            raise KeyError("a bug")

    train(make_settings(**tiny(out="out", hang_timeout=4)), Watcher(lose))


@pytest.mark.parametrize("how", ["dies", "hangs", "fails"])
def test_a_lost_rank_is_named_by_the_others_within_a_bound(place: Path, how: str) -> None:
    begin = time.monotonic()
    left, lost = run_ranks(2, lose_a_rank, place, how, timeout=60, expect_error=True)
    assert time.monotonic() - begin < 45
    if how == "hangs":
        # Both are held, the one in its sleep and the other in a collective: their processes end.
        for outcome in (left, lost):
            assert outcome.message.endswith(f"exit code {RANK_LOST}"), outcome
            lines = [line for line in outcome.log.splitlines() if line.startswith("ds-optim: error: ")]
            assert len(lines) == 1
            assert "rank 1 hangs: no progress for 4 s (--hang-timeout), rank 1 at step 2, in lose" in lines[0]
    else:
        assert left.error_type == "RankLost", left
        assert left.message.startswith("rank 1 died" if how == "dies" else "rank 1 failed: KeyError: 'a bug'")
        assert "\n" not in left.message
    end = json.loads((place / "out/end.json").read_text())
    assert (end["status"], end["step"]) == (RANK_LOST, 2)


# ---- bad numbers


def poisoned(rank: int, world_size: int, folder: Path) -> list[Any]:
    """Runs in which the gradient of rank 1 alone is NaN, in some steps and for good."""
    os.chdir(folder)
    found: list[Any] = []
    for stage, dtype in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
        for last in (3, STEPS):
            bad = {"now": False}

            def start(engine: Any, bad: dict[str, bool] = bad) -> None:
                weight = next(p for p in engine.module.parameters() if p.requires_grad)
                weight.register_hook(lambda g: g * float("nan") if rank == 1 and bad["now"] else g)

            def after(engine: Any, step: int, bad: dict[str, bool] = bad, last: int = last) -> None:
                bad["now"] = 1 <= step < last

            given = tiny(stage=stage, dtype=dtype, max_skips=3, out=f"{stage}-{last}")
            try:
                result = train(make_settings(**given), Watcher(after, start))
                found.append((stage, result.skipped_steps, result.steps, result.val_loss < 10))
            except BadNumbers as error:
                found.append((stage, error.status, str(error)))
    return found


def test_bad_numbers_of_one_rank_are_skipped_by_all_and_stop_a_run_that_does_not_get_out_of_them(place: Path) -> None:
    first, second = run_ranks(2, poisoned, place, timeout=200)
    assert first == second
    for stage in (0, 1, 2, 3):
        through, stopped = (found for found in first if found[0] == stage)
        assert through[1:] == (2, STEPS, True)
        assert stopped[1] == BAD_NUMBERS
        assert "steps 2 to 4 were all skipped or had no finite loss (--max-skips 3)" in stopped[2]
        skipped = [line["skipped"] for line in log_of(place / f"{stage}-3") if "skipped" in line]
        assert skipped == [False, True, True, False, False, False]
        end = json.loads((place / f"{stage}-{STEPS}/end.json").read_text())
        assert (end["status"], end["step"]) == (BAD_NUMBERS, 4)


# ---- the commands themselves


def rank_processes(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """The ranks that a launcher started, by rank."""
    found = {}
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "--local_rank=" in " ".join(process.cmdline()):
                found[int(process.environ()["RANK"])] = process
    return found


# A rank that is killed is chaos's work too, though not under the launcher.
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, PREEMPTED), *([(signal.SIGKILL, RANK_LOST)] if ALL else [])]
)
def test_the_launcher_ends_within_a_bound_when_a_rank_is_told_to_or_dies(
    place: Path, number: signal.Signals, status: int
) -> None:
    arguments = "--model model --optimizer lion --stage 1 --dtype fp32 --seq-len 16 --micro-batch 2 --eval-batches 1"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (place / "output").open("w") as output:
        command = launched(*arguments.split(), "--steps", "1000000", "--out", "out")
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=output, stderr=output)
    ranks: dict[int, psutil.Process] = {}
    try:
        wait_for(lambda: (place / "out/log.jsonl").exists() and len(log_of(place / "out")) > 2, 120)
        ranks = rank_processes(psutil.Process(process.pid))
        ranks[1].send_signal(number)
        launcher_status = process.wait(60)
    finally:
        for left in ranks.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
    # The launcher passes on the status of the rank that it sees end first; the run itself says how it ended.
    assert launcher_status == (PREEMPTED if number == signal.SIGUSR1 else 256 - signal.SIGKILL)
    end = json.loads((place / "out/end.json").read_text())
    assert end["status"] == status
    if status == RANK_LOST:
        errors = [line for line in (place / "output").read_text().splitlines() if line.startswith("ds-optim: error: ")]
        assert len(errors) == 1
        assert errors[0].startswith("ds-optim: error: rank 1 died")
    else:
        assert (place / f"out/checkpoints/step-{end['step']}" / manifest.NAME).exists()


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not come that far"
        time.sleep(0.1)


def test_chaos_finds_nothing_lost(tmp_path: Path) -> None:
    """A few random kill points, the same each time; `ds-optim chaos` runs a hundred, under launchers too."""
    done = command(
        [sys.executable, "-m", "ds_optim", "chaos", "--kills", "6", "--seed", "6", "--folder", str(tmp_path)], tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert sum("as promised" in line for line in lines) >= 11
    for fault in ("SIGKILL in start", "SIGKILL in save", ": file ", "a second run in the folder of one that runs"):
        assert any(fault in line for line in lines), done.stderr
    assert any("disk full in the first save" in line or "disk full: skipped" in line for line in lines)
    assert not list(tmp_path.iterdir())


REQUEUED = """
if [[ -e again ]]; then echo "$*" >>starts; exit 0; fi
touch again; mkdir -p out/checkpoints/step-3
touch out/checkpoints/step-3/manifest.json
echo '{"status": 75, "step": 3, "line": "stopped"}' >out/end.json
echo "$*" >>starts
exit 1
"""


def test_a_preempted_run_is_started_again_with_resume(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(REQUEUED)
    script = Path(__file__).parent.parent.parent / "launch" / "requeue.sh"
    done = command(["bash", str(script), "out", "bash", "job.sh", "train"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts").read_text().splitlines() == ["train", "train --resume"]
    (tmp_path / "job.sh").write_text("echo once >>starts; exit 65")
    assert command(["bash", str(script), "out", "bash", "job.sh"], tmp_path).returncode == 65
