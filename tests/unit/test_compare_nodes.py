"""Cells by a command that starts the ranks: how each way to end becomes a reason, and that nothing is left running."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ds_optim.errors import UserError
from ds_optim.sweep.launch import CellJob, CellOutcome
from ds_optim.sweep.nodes import VARIABLE, CommandLauncher, launcher_from, reason_of


def run(folder: Path, script: str, timeout_s: float = 20) -> CellOutcome:
    return CommandLauncher(["bash", "-c", script, "launcher"])(CellJob(folder=folder, ranks=2, timeout_s=timeout_s))


def failure(folder: Path, rank: int, reason: str, seconds: float) -> None:
    record = {"reason": reason, "time": seconds, "node": f"node{rank + 1}"}
    (folder / f"rank{rank}.failure.json").write_text(json.dumps(record))


def test_a_cell_that_leaves_its_result_is_fine(tmp_path: Path) -> None:
    outcome = run(tmp_path, 'echo "$DS_OPTIM_RUN" >"$1/token"; echo {} >"$1/result.json"')
    assert outcome.reason is None
    first = (tmp_path / "token").read_text()
    again = CommandLauncher(["bash", "-c", 'echo "$DS_OPTIM_RUN" >"$1/token"', "launcher"])
    reasons = [again(CellJob(folder=tmp_path, ranks=2, timeout_s=20)).reason for _ in range(2)]
    assert reasons == [None, None]
    assert (tmp_path / "token").read_text() != first
    assert (tmp_path / "token").read_text().strip().endswith("-2")


def test_the_rank_that_failed_is_named_and_not_the_one_that_lost_it(tmp_path: Path) -> None:
    failure(tmp_path, 0, "RuntimeError: Connection closed by peer", 1.0)
    failure(tmp_path, 1, "OutOfMemoryError: CUDA out of memory", 2.0)
    assert reason_of(tmp_path, 2, 1) == "rank 1 on node2: OutOfMemoryError: CUDA out of memory"


def test_a_rank_that_was_killed_is_told_by_its_launcher(tmp_path: Path) -> None:
    failure(tmp_path, 0, "RuntimeError: Connection closed by peer", 1.0)
    (tmp_path / "launcher.log").write_text("starting\npdsh@node1: node2: ssh exited with exit code 137\nlast\n")
    assert reason_of(tmp_path, 2, 137) == (
        "the launcher ended with status 137: pdsh@node1: node2: ssh exited with exit code 137;"
        " rank 0 on node1: RuntimeError: Connection closed by peer"
    )


def test_a_launcher_that_fails_or_leaves_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "echo 'x.sh: error: node9 cannot be reached' >&2; exit 2").reason == (
        "the launcher ended with status 2: x.sh: error: node9 cannot be reached"
    )
    assert run(tmp_path, "true").reason == "the launcher ended with status 0: (no output)"


def test_a_cell_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = run(tmp_path, 'sleep 60 & trap "kill $!; exit 75" TERM; wait', timeout_s=1)
    assert outcome.reason == "timed out after 1 s"
    assert time.monotonic() - begin < 15


def test_the_environment_names_the_launcher() -> None:
    assert launcher_from({}) is None
    assert launcher_from({VARIABLE: "bash launch/hostfile.sh --hostfile 'a b' cell"}) is not None
    with pytest.raises(UserError, match=VARIABLE):
        launcher_from({VARIABLE: ""})
