"""``ds-optim compare``: mistakes before the first cell, cells that end badly, and one comparison for real."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ds_optim.errors import UserError
from ds_optim.job.exits import Preempted
from ds_optim.machine.child import reason_line
from ds_optim.report import Row, read_rows
from ds_optim.sweep import launch as compare_launch
from ds_optim.sweep.cells import plan_cells, reproduce
from ds_optim.sweep.compare import CompareSettings, run_compare
from ds_optim.sweep.launch import CellJob, CellOutcome, ForkserverLauncher, failure_reason
from ds_optim.sweep.result import CellResult, RankSpeed
from ds_optim.sweep.worker import run_rank

SMALL = {"steps": 5, "seq_len": 32, "micro_batch": 2, "eval_batches": 1}


def settings(out: Path, **given: Any) -> CompareSettings:
    return CompareSettings(**{"optimizers": ["lion"], "stages": [1], "out": out, **SMALL, **given})


def never_called(job: CellJob) -> CellOutcome:
    raise AssertionError("a cell was started before the settings were checked")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"optimizers": ["lion_muonn"]}, r"unknown optimizer type 'lion_muonn' \(did you mean 'LionMuon'\?\)"),
        ({"optimizers": ["deepspeed:Muom"]}, r"DeepSpeed has no optimizer 'Muom' \(did you mean 'muon'\?\)"),
        ({"optimizer_params": {"lin": {}}}, r"'lin', which is not compared \(did you mean 'lion'\?\)"),
        ({"preset": "qwen3-tyni"}, r"unknown preset 'qwen3-tyni' \(did you mean 'qwen3-tiny'\?\)"),
        ({"data": "no-such-text.txt"}, r"no-such-text\.txt"),
        ({"seq_len": 10**8}, r"fewer than one sequence"),
    ],
)
def test_mistakes_are_one_line_before_the_first_cell(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        run_compare(settings(tmp_path, **given), never_called)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stages": [1, 4]}, "there is no ZeRO stage 4; write 0, 1, 2 or 3"),
        ({"optimizers": []}, "at least 1 item"),
        ({"steps": 3}, "greater than 3"),
        ({"ranks": 0}, "greater than or equal to 1"),
        ({"optimisers": ["lion"]}, "Extra inputs"),
    ],
)
def test_settings_refuse_what_no_run_can_be(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        settings(tmp_path, **given)


def test_momentum_dtypes_are_cells_of_optimizers_that_have_them(tmp_path: Path) -> None:
    given = {"optimizers": ["adamw", "lion"], "momentum_dtypes": ["float32", "int8"]}
    planned = plan_cells(settings(tmp_path, **given))
    assert [cell.label for cell in planned] == ["adamw", "lion", "lion, int8"]
    assert len({cell.folder for cell in planned}) == 3
    assert [cell.train.optimizer_params.get("momentum_dtype") for cell in planned] == [None, None, "int8"]
    assert "--momentum-dtypes float32,int8" in reproduce(settings(tmp_path, **given))
    with pytest.raises(ValidationError, match=r"unknown momentum dtype 'int9' \(did you mean 'int8'\?\)"):
        settings(tmp_path, momentum_dtypes=["int9"])


def test_what_else_the_json_says_reaches_every_cell(tmp_path: Path) -> None:
    given = {"deepspeed": {"zero_optimization": {"overlap_comm": False}, "data_types": {"grad_accum_dtype": "fp32"}}}
    (cell,) = plan_cells(settings(tmp_path, **given))
    assert cell.train.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = cell.train.deepspeed["zero_optimization"]
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] > 0, "beside the sweep's own buckets"


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a folder that you may write to"):
        run_compare(settings(tmp_path / "file" / "out"), never_called)


def test_cells_differ_in_optimizer_and_stage_alone(tmp_path: Path) -> None:
    given = {"optimizers": ["lion", "deepspeed:Muon"], "stages": [1, 3], "optimizer_params": {"lion": {"lr": 1.0}}}
    planned = plan_cells(settings(tmp_path, repeat=2, **given))
    assert [(cell.optimizer, cell.stage) for cell in planned] == 2 * [
        ("lion", 1), ("deepspeed:Muon", 1), ("lion", 3), ("deepspeed:Muon", 3),
    ]  # fmt: skip
    assert len({cell.folder for cell in planned}) == 8
    own = {"optimizer", "optimizer_params", "stage", "out", "deepspeed", "seed"}
    assert len({cell.train.model_dump_json(exclude=own) for cell in planned}) == 1
    assert [cell.train.seed for cell in planned] == 4 * [0] + 4 * [1], "a pass over all cells has one seed"
    assert planned[0].train.resolved_params()["lr"] == 1.0
    zero = [cell.train.deepspeed["zero_optimization"] for cell in planned[:4]]
    assert [z.get("reduce_scatter", True) for z in zero] == [True, True, True, False]
    assert [len(cell.notes) for cell in planned[:4]] == [0, 2, 0, 3], "what DeepSpeed's Muon needs is said in its row"


def test_the_command_to_reproduce_carries_what_was_set(tmp_path: Path) -> None:
    command = reproduce(settings(tmp_path / "out", dtype="fp32", optimizer_params={"lion": {"lr": 0.1}}))
    assert command.startswith("ds-optim compare --optimizers lion --stages 1 --ranks 2 --steps 5")
    assert "--dtype fp32" in command
    assert """--optimizer-params '{"lion": {"lr": 0.1}}'""" in command
    assert "--seed" not in command
    assert str(tmp_path) not in command


def stand_in(job: CellJob) -> CellOutcome:
    """A launcher whose cells at stage 2 run out of memory, and that leaves results of the others."""
    if "stage2" in job.folder.name:
        return CellOutcome(reason="rank 1: OutOfMemoryError: tried to allocate 20 GiB", wall_s=1.0)
    train = json.loads((job.folder / "cell.json").read_text())["train"]
    rank = RankSpeed(
        times_ms=[10.0, 20.0],
        peak_bytes=1,
        peak_kind="live tensors",
        rss_peak_bytes=None,
        sent_bytes_per_step=1.0,
        sent_by_operator={},
        node_sent_per_step=None,
        model_state_bytes=7,
        state_bytes=200,
        owners={},
    )
    other = rank.model_copy(update={"times_ms": [30.0, 10.0], "model_state_bytes": 9})
    losses: dict[str, Any] = {"val_loss": 2.0, "unigram_entropy": 3.0, "losses": [3.0], "steps": train["steps"]}
    left = CellResult(**losses, skipped_steps=0, parameters=100, nodes=["a", "a"], speed=[rank, other])
    (job.folder / "result.json").write_text(left.model_dump_json())
    return CellOutcome(reason=None, wall_s=1.0)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_keeps_what_it_has_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    started: list[str] = []

    def interrupted(job: CellJob) -> CellOutcome:
        started.append(job.folder.name)
        if len(started) == 4:
            (job.folder / "log.jsonl").write_text("half a cell")
            os.kill(os.getpid(), number)
            time.sleep(10)
        return stand_in(job)

    given: dict[str, Any] = {"optimizers": ["adamw", "lion"], "stages": [1, 2, 3]}
    with pytest.raises(
        Preempted, match=r"^interrupted: 3 cells are kept in .*results\.jsonl; .* with --resume goes on"
    ):
        run_compare(settings(tmp_path, **given), interrupted)
    assert len(started) == 4
    left = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(UserError, match=r"holds results\.jsonl of an earlier run: add --resume to go on, --force"):
        run_compare(settings(tmp_path, **given), never_called)
    with pytest.raises(UserError, match="holds another sweep; go on with ds-optim compare --optimizers adamw,lion"):
        run_compare(settings(tmp_path, **given, dtype="fp32", resume=True), never_called)
    assert (tmp_path / "results.jsonl").read_text() == left

    def goes_on(job: CellJob) -> CellOutcome:
        assert not (job.folder / "log.jsonl").exists()
        started.append(job.folder.name)
        return stand_in(job)

    assert run_compare(settings(tmp_path, **given, resume=True), goes_on) == 1
    # The one that failed, the one that was cut short, and the two that had not begun.
    assert started[4:] == ["adamw-stage2", "lion-stage2", "adamw-stage3", "lion-stage3"]
    assert len(read_rows(tmp_path / "results.jsonl")) == 6
    assert run_compare(settings(tmp_path, **given, force=True), stand_in) == 1
    with pytest.raises(UserError, match="holds no sweep; start without --resume"):
        run_compare(settings(tmp_path / "none", **given, resume=True), never_called)


@pytest.mark.full
def test_a_failed_cell_is_a_row_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(settings(tmp_path, optimizers=["adamw", "lion"], stages=[1, 2, 3]), stand_in) == 1
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(row.stage, row.status) for row in rows] == [
        (1, "ok"), (1, "ok"), (2, "failed"), (2, "failed"), (3, "ok"), (3, "ok"),
    ]  # fmt: skip
    assert rows[0].ms_per_step == 25.0, "of each step the slowest rank: 30 and 20"
    assert rows[0].tokens_per_s == pytest.approx(2 * 32 * 2 / 0.025)
    assert rows[0].state_bytes_per_param == 4.0
    assert rows[0].model_state_bytes == 9
    assert rows[0].rss_peak_bytes is None
    shown = capsys.readouterr().out
    assert shown.count("rank 1: OutOfMemoryError: tried to allocate 20 GiB") == 4, "as it happens, and under the table"
    assert str(tmp_path / "report.html") in shown
    assert "OutOfMemoryError" in (tmp_path / "report.html").read_text()


def test_a_user_error_keeps_its_line_and_others_their_class() -> None:
    assert reason_line(UserError("write this instead")) == "write this instead"
    assert reason_line(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert len(reason_line(RuntimeError("x" * 10_000))) == 400


def test_the_reason_is_the_rank_that_failed_first_not_the_one_that_lost_it(tmp_path: Path) -> None:
    lost = {"reason": "RuntimeError: Connection closed by peer", "time": 1.0}
    cause = {"reason": "ValueError: bad", "time": 2.0}
    (tmp_path / "rank0.failure.json").write_text(json.dumps(lost))
    (tmp_path / "rank1.failure.json").write_text(json.dumps(cause))
    assert failure_reason(tmp_path, {0: 1, 1: 1}) == "rank 1: ValueError: bad"
    (tmp_path / "rank2.log").write_text("before\nbus error\n\n")
    told = failure_reason(tmp_path, {0: 1, 1: 1, 2: -signal.SIGKILL})
    assert told == "rank 2: killed by SIGKILL, out of memory perhaps; last line of its log: bus error"


def test_a_rank_without_a_cell_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_rank(tmp_path) == 1
    assert "FileNotFoundError" in json.loads((tmp_path / "rank3.failure.json").read_text())["reason"]


def _one_dies(environment: Mapping[str, str], folder: str) -> None:
    """A stand-in for a rank: rank 1 is killed, the others would sleep for a minute."""
    (Path(folder) / f"pid{environment['RANK']}").write_text(str(os.getpid()))
    if environment["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _all_sleep(environment: Mapping[str, str], folder: str) -> None:
    (Path(folder) / f"pid{environment['RANK']}").write_text(str(os.getpid()))
    time.sleep(600)


@pytest.fixture(scope="module")
def launcher() -> ForkserverLauncher:
    return ForkserverLauncher(2)


def _gone(folder: Path) -> bool:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_others_within_seconds(
    tmp_path: Path, launcher: ForkserverLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_launch, "work", _one_dies)
    outcome = launcher(CellJob(folder=tmp_path, ranks=2, timeout_s=300))
    assert outcome.reason is not None
    assert outcome.reason.startswith("rank 1: killed by SIGKILL")
    assert _gone(tmp_path)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cell_that_hangs_is_ended_at_its_timeout(
    tmp_path: Path, launcher: ForkserverLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_launch, "work", _all_sleep)
    outcome = launcher(CellJob(folder=tmp_path, ranks=2, timeout_s=1))
    assert outcome.reason == "timed out after 1 s (rank 0, 1 still running)"
    assert outcome.wall_s < 60, "they sleep ten minutes"
    assert _gone(tmp_path)


def _by_optimizer(rows: list[Row]) -> dict[str, Row]:
    return {row.optimizer: row for row in rows}


@pytest.mark.full
def test_a_comparison_for_real(tmp_path: Path) -> None:
    given = {"optimizers": ["lion", "lion_muon", "muon"], "stages": [3], "optimizer_params": {"muon": {"perod": 2}}}
    assert run_compare(settings(tmp_path, timeout=300, **given)) == 1
    rows = _by_optimizer(read_rows(tmp_path / "results.jsonl"))
    assert rows["muon"].status == "failed"
    assert rows["muon"].reason is not None
    assert "perod" in rows["muon"].reason
    for name in ("lion", "lion_muon"):
        row = rows[name]
        assert row.status == "ok", row.reason
        assert len(row.train_loss) == SMALL["steps"]
        assert row.state_bytes_per_param == 4.0, "one fp32 momentum, padding apart"
        held = row.extra["memory_by_owner"][0]
        assert held["gradients"] > 0
        assert held["master"] == 2 * row.extra["parameters"], "half the fp32 weights, on two ranks"
        assert row.peak_bytes is not None
        assert row.model_state_bytes is not None
        assert row.peak_bytes > row.model_state_bytes
        assert row.wire_bytes_per_step is not None
    assert rows["lion"].train_loss[0] == rows["lion_muon"].train_loss[0], "same weights, same first batch"
    elements_sent = rows["lion_muon"].wire_bytes_per_step - rows["lion"].wire_bytes_per_step  # type: ignore[operator]
    assert elements_sent > 0, "LionMuon's cut matrices travel to their owners, Lion's do not"
