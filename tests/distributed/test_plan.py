"""Plans that ranks make together: by rank 0's clock, the same after a resume; and what a step then holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ds_optim.elementwise import native
from ds_optim.memory.tracker import TensorTracker
from ds_optim.optimizers import costs

from .harness import run_ranks
from .small_runs import MUON, Cell, one_step, own_optimizer, start


def polished(rank: int) -> Any:
    """A clock on which rank 0 finds large matrices cheap, and any other rank would say otherwise."""
    return lambda work, shape, device: 1.0 + shape[0] if rank else 1e4 / (shape[0] * shape[1])


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"DS_OPTIM_CACHE": str(folder)}):
        yield


def plans_of(engine: Any) -> list[str]:
    return [worker.digest() for _, worker in sorted(own_optimizer(engine).matrix_workers.items())]


def planned(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """Plans of runs that differ in what they know about costs."""

    def run(name: str, exchange: dict[str, Any] | None = None, load: Path | None = None, cache: str = "") -> list[str]:
        optimizer = {**MUON, "params": {**MUON["params"], "exchange": exchange or {}}}  # type: ignore[dict-item]
        with own_cache(folder / (cache or name)):
            engine = start(Cell(stage=3), world_size, optimizer)
            if load is not None:
                engine.load_checkpoint(str(load))
            one_step(engine, 0, rank, world_size)
            engine.save_checkpoint(str(folder / f"{name}-saved"))
            found = plans_of(engine)
            engine.destroy()
        return found

    found = {"modelled": run("modelled", {"costs": "modelled"})}
    with mock.patch.object(costs, "_timed", polished(rank)):
        found["measured"] = run("measured")
    found["again, from the cache"] = run("again", cache="measured")
    found["resumed, with an empty cache"] = run("resumed", load=folder / "measured-saved")
    found["resumed, modelled"] = run("unmeasured", {"costs": "modelled"}, load=folder / "measured-saved")
    return found


def test_rank_0s_clock_decides_and_a_resumed_run_keeps_its_plan(tmp_path: Path) -> None:
    first, *others = run_ranks(3, planned, tmp_path)
    assert all(other == first for other in others)
    assert first["measured"] != first["modelled"], "else nothing is shown"
    assert first["again, from the cache"] == first["measured"]
    assert first["resumed, with an empty cache"] == first["measured"]
    assert first["resumed, modelled"] == first["modelled"]


def loaded_late(rank: int, world_size: int, folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Plans of a run, of another one before it loads the first one's checkpoint, and after."""
    with own_cache(folder / "first"), mock.patch.object(costs, "_timed", polished(rank)):
        engine = start(Cell(stage=3), world_size, MUON)
        one_step(engine, 0, rank, world_size)
        engine.save_checkpoint(str(folder / "saved"))
        saved = plans_of(engine)
        engine.destroy()
    with own_cache(folder / "second"), mock.patch.object(costs, "_timed", polished(1)):
        engine = start(Cell(stage=3), world_size, MUON)
        one_step(engine, 0, rank, world_size)
        before = plans_of(engine)
        engine.load_checkpoint(str(folder / "saved"))
        one_step(engine, 1, rank, world_size)
        after = plans_of(engine)
        engine.destroy()
    return saved, before, after


def test_a_checkpoint_loaded_between_steps_brings_its_plan(tmp_path: Path) -> None:
    for saved, before, after in run_ranks(3, loaded_late, tmp_path):
        assert saved == after
        assert before != after, "else nothing is shown"


def held(rank: int, world_size: int, cell: Cell, bucket_mb: float, overlap: bool) -> tuple[int, float, int]:
    """Bytes that a step held beyond what it found, what the plan allows them to be, and buckets."""
    polar = {"steps": 2, "dtype": "float32", "method": "standard"}
    params = {"polar": polar, "exchange": {"bucket_mb": bucket_mb, "overlap": overlap}}
    engine = start(cell, world_size, {"type": "Muon", "params": params})
    one_step(engine, 0, rank, world_size)
    optimizer = own_optimizer(engine)
    peaks: list[int] = []
    bounds: list[float] = []
    for _, worker in sorted(optimizer.matrix_workers.items()):
        unit, work = worker.plan.unit, worker.work
        c = work.held_per_element(unit, set(worker.plan.views.values()))
        largest = max(unit.params[param].numel for param in worker.plan.views)
        bounds.append(max(bucket_mb * 2**20, c * largest) + (c * len(unit.params) if cell.stage == 3 else 0))
        run = worker.run

        def tracked(*args: Any, run: Any = run) -> None:
            with TensorTracker() as tracker:
                run(*args)
            peaks.append(tracker.peak_bytes - tracker.base_bytes)

        worker.run = tracked  # type: ignore[method-assign]
    one_step(engine, 1, rank, world_size)
    buckets = max(len(worker.plan.buckets) for worker in optimizer.matrix_workers.values())
    engine.destroy()
    assert len(peaks) == len(bounds)
    slack = 2048  # rates, norms and the like
    if not native.is_available():  # eager steps walk in chunks
        slack += 3 * 4 * max(s.numel for w in optimizer.matrix_workers.values() for s in w.plan.unit.slices(rank))
    return max(peaks), max(bounds) + slack, buckets


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("bucket_mb", [0.001, 0.25])
def test_a_step_holds_no_more_than_the_bucket_or_a_multiple_of_the_largest_matrix(
    stage: int, bucket_mb: float, overlap: bool
) -> None:
    for peak, bound, buckets in run_ranks(2, held, Cell(stage=stage), bucket_mb, overlap):
        assert 0 < peak <= bound
        assert (buckets > 1) == (stage == 3 and bucket_mb < 0.01)
