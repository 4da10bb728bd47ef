"""``ds-optim memory``: one sweep for real, a cell that runs out of memory in the middle of it, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ds_optim.memory.moments import MOMENTS
from ds_optim.report import Row, read_rows
from ds_optim.sweep.memory import MemorySettings, plan_memory, run_memory

pytestmark = pytest.mark.full

SMALL = {"seq_len": 32, "micro_batch": 2, "repeat": 1, "steady": 2}
#: Elements of a bucket that no machine has memory for; DeepSpeed makes it at stages 1 to 3 and not at stage 0.
IMPOSSIBLE = 10**15


def settings(out: Path, **given: Any) -> MemorySettings:
    return MemorySettings(**{"optimizers": ["adamw", "lion"], "stages": [3], "out": out, **SMALL, **given})


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("memory")
    given = {"momentum_dtypes": ["float32", "int8"], "optimizer_params": {"adamw": {"torch_adam": True}}}
    assert run_memory(settings(out, **given)) == 0
    return read_rows(out / "results.jsonl")


def test_states_are_estimated_counted_and_measured_alike(swept: list[Row]) -> None:
    assert [row.label for row in swept] == ["adamw", "lion", "lion, int8"]
    for row in swept:
        lines = {entry["what"]: entry for entry in row.extra["reconciliation"]}
        assert set(lines) == {"model states", "activations", "peak", *MOMENTS}
        assert abs(lines["model states"]["share"]) < 0.001
        for moment in MOMENTS:
            assert abs(lines[moment]["share"]) < 0.02, (row.label, moment)


def test_state_and_savings_are_the_formulas(swept: list[Row]) -> None:
    adamw, lion, int8 = swept
    assert (adamw.state_bytes_per_param, lion.state_bytes_per_param) == (8.0, 4.0)
    assert int8.state_bytes_per_param is not None
    assert int8.state_bytes_per_param <= 1.05
    saved = (adamw.model_state_bytes or 0) - (lion.model_state_bytes or 0)
    assert saved == pytest.approx(4 * lion.extra["parameters"] / 2, rel=0.001), "4/N bytes a parameter and rank"


def test_peaks_are_of_steady_steps_by_rank(swept: list[Row]) -> None:
    for row in swept:
        assert [entry["rank"] for entry in row.extra["peaks"]] == [0, 1]
        for entry in row.extra["peaks"]:
            assert entry["min"] <= entry["median"] <= entry["max"]
            assert entry["resident"] > entry["median"], "libraries are resident too"
        assert row.peak_bytes == max(entry["median"] for entry in row.extra["peaks"])
        forward = row.extra["moments"][0]["after forward"]["accounted"]
        assert 0 < forward["activations"] < row.peak_bytes


def test_a_cell_without_memory_is_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    given = {"optimizers": ["lion"], "stages": [2, 0], "ranks": 1}
    assert (
        run_memory(settings(tmp_path, deepspeed={"zero_optimization": {"reduce_bucket_size": IMPOSSIBLE}}, **given))
        == 1
    )
    failed, ran = read_rows(tmp_path / "results.jsonl")
    assert (failed.stage, failed.status, failed.extra["out_of_memory"]) == (2, "failed", True)
    assert failed.reason is not None
    assert "rank 0" in failed.reason
    assert (ran.stage, ran.status) == (0, "ok")


def test_steps_follow_from_what_is_measured(tmp_path: Path) -> None:
    (cell,) = plan_memory(settings(tmp_path, optimizers=["lion"], steady=4))
    assert cell.train.steps == 7, "two before, four whose peak is taken, one that is counted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA allocator to take a snapshot of")
def test_a_snapshot_needs_cuda(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="ranks will use no CUDA device: leave it out"):
        settings(tmp_path, snapshot=True)
