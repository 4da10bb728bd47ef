"""Plans that ranks make together: by rank 0's clock, the same after a resume; and what a step then holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ds_optim.elementwise import native
from ds_optim.matrix import dispatch
from ds_optim.memory.tracker import TensorTracker
from ds_optim.optimizers import costs

from .harness import run_ranks
from .small_runs import MUON, Cell, one_step, own_optimizer, start
from .test_universal import to_universal


def polished(rank: int) -> Any:
    """A clock on which rank 0 finds large matrices cheap, and any other rank would say otherwise."""
    return lambda plan, size, device: 1.0 + size[0] if rank else 1e4 / (size[0] * size[1])


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"DS_OPTIM_CACHE": str(folder)}):
        yield


def plans_of(engine: Any) -> list[str]:
    return [exchange.plan.digest() for _, exchange in sorted(own_optimizer(engine).exchanges.items())]


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
    with mock.patch.object(costs, "_timed", polished(rank)), mock.patch.object(costs, "_STARTS", 1):
        found["measured"] = run("measured")
    with mock.patch.object(costs, "_STARTS", 1):
        found["again, from the cache"] = run("again", cache="measured")
    found["resumed, with an empty cache"] = run("resumed", load=folder / "measured-saved")
    found["resumed, modelled"] = run("unmeasured", {"costs": "modelled"}, load=folder / "measured-saved")
    return found


@pytest.mark.full
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


@pytest.mark.full
def test_a_checkpoint_loaded_between_steps_brings_its_plan(tmp_path: Path) -> None:
    for saved, before, after in run_ranks(3, loaded_late, tmp_path):
        assert saved == after
        assert before != after, "else nothing is shown"


def universal(rank: int, world_size: int, folder: Path, load: bool) -> list[str]:
    """Plans of a run that is saved, or of one that goes on from it by way of DeepSpeed's universal format."""
    clock = polished(1) if load else polished(rank)
    cell = Cell(stage=3, config={"checkpoint": {"load_universal": True}} if load else {})
    with own_cache(folder / str(load)), mock.patch.object(costs, "_timed", clock):
        engine = start(cell, world_size, MUON)
        if load:
            engine.load_checkpoint(str(folder))
        one_step(engine, 0, rank, world_size)
        if not load:
            engine.save_checkpoint(str(folder), tag="one")
        found = plans_of(engine)
        engine.destroy()
    return found


@pytest.mark.full
def test_a_universal_load_brings_the_plan(tmp_path: Path) -> None:
    saved = run_ranks(3, universal, tmp_path, False)
    to_universal(tmp_path, "one")
    assert run_ranks(3, universal, tmp_path, True) == saved
    assert run_ranks(3, loaded_late, tmp_path / "late")[0][1] != saved[0], "what the second clock says is another plan"


def failing(rank: int, world_size: int, folder: Path) -> str:
    """What a step says where rank 0 alone cannot choose."""

    def broken(*args: object) -> None:
        raise ZeroDivisionError("the clock\nstands still")

    with own_cache(folder), mock.patch.object(costs, "_timed", broken):
        engine = start(Cell(stage=3), world_size, MUON)
        try:
            one_step(engine, 0, rank, world_size)
        except RuntimeError as error:
            return str(error)
        finally:
            engine.destroy()
    return "no error"


@pytest.mark.full
def test_what_rank_0_cannot_do_is_said_by_all(tmp_path: Path) -> None:
    said = "rank 0 could not plan the exchange of matrices: ZeroDivisionError: the clock stands still"
    assert run_ranks(2, failing, tmp_path) == [said, said]


def unequal(rank: int, world_size: int, folder: Path) -> tuple[list[str], list[bool]]:
    """Plans and whether they are by the clock, of ranks that have different numbers of threads."""
    torch.set_num_threads(1 + rank)
    try:
        with own_cache(folder):
            engine = start(Cell(stage=3), world_size, MUON)
            one_step(engine, 0, rank, world_size)
            exchanges = own_optimizer(engine).exchanges.values()
            found = plans_of(engine), [exchange.plan.timed is not None for exchange in exchanges]
            engine.destroy()
    finally:
        torch.set_num_threads(1)
    return found


@pytest.mark.full
def test_ranks_with_other_threads_plan_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, unequal, tmp_path)
    assert first == second
    assert first[1] == [True]


def replicas(rank: int, world_size: int, folder: Path) -> list[str]:
    """How matrices are worked on at stage 0 where rank 1 has been told otherwise by its own table."""
    with own_cache(folder / str(rank)):
        if rank == 1:
            dispatch.store(torch.device("cpu"), {"float32": {"gram_from": 1.0, "strips": {"4": 3}}})
        optimizer = {"type": "Muon", "params": {"polar": {"dtype": "float32"}}}
        engine = start(Cell(stage=0), world_size, optimizer)
        one_step(engine, 0, rank, world_size)
        found = [str(exchange.plan.polar) for exchange in own_optimizer(engine).exchanges.values()]
        engine.destroy()
    return found


@pytest.mark.full
def test_replicas_work_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, replicas, tmp_path)
    assert first == second


def held(
    rank: int, world_size: int, cell: Cell, kind: str, bucket_mb: float, overlap: bool
) -> list[tuple[int, float, int]]:
    """For each unit: bytes that a step held beyond what it found, what they may be, and buckets."""
    polar = {"steps": 2, "dtype": "float32", "method": "standard"}
    params = {"polar": polar, "exchange": {"bucket_mb": bucket_mb, "overlap": overlap}, **KINDS[kind][1]}
    engine = start(cell, world_size, {"type": KINDS[kind][0], "params": params})
    one_step(engine, 0, rank, world_size)
    found: list[tuple[int, float, int]] = []
    for _, exchange in sorted(own_optimizer(engine).exchanges.items()):
        unit, c = exchange.plan.unit, exchange.plan.held_per_element
        largest = max(unit.params[param].numel for param in exchange.plan.views)
        bound = max(bucket_mb * 2**20, c * largest) + (c * len(unit.params) if cell.stage == 3 else 0)
        bound += 2048  # rates, norms and the like
        if not native.is_available():  # eager steps walk in chunks
            bound += 3 * 4 * max(piece.numel for piece in unit.slices(rank))

        def tracked(*args: Any, run: Any = exchange.run, exchange: Any = exchange, bound: float = bound) -> None:
            with TensorTracker() as tracker:
                run(*args)
            found.append((tracker.peak_bytes - tracker.base_bytes, bound, len(exchange.plan.buckets)))

        exchange.run = tracked  # type: ignore[method-assign]
    one_step(engine, 1, rank, world_size)
    engine.destroy()
    return found


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon": ("Muon", {}),
    "SpectralLion": ("SpectralLion", {"basis": "weight"}),
    "SpectralLion-momentum": ("SpectralLion", {"basis": "momentum"}),
    "SpectralLion-gradient": ("SpectralLion", {"basis": "gradient", "momentum_dtype": "int8"}),
    "transposed": ("Muon", {"views": [{"match": "weight", "transpose": True}]}),
    "signs, transposed": ("SpectralLion", {"basis": "momentum", "views": [{"match": "weight", "transpose": True}]}),
}
HELD = [
    *(("Muon", stage, mb, overlap) for stage in (1, 3) for mb in (0.001, 0.05) for overlap in (True, False)),
    *((kind, 3, 0.001, True) for kind in KINDS if kind != "Muon"),
]


@pytest.mark.full
@pytest.mark.parametrize(("kind", "stage", "bucket_mb", "overlap"), HELD)
def test_a_step_holds_no_more_than_the_bucket_or_a_multiple_of_the_largest_matrix(
    kind: str, stage: int, bucket_mb: float, overlap: bool
) -> None:
    for seen in run_ranks(2, held, Cell(stage=stage), kind, bucket_mb, overlap):
        assert seen
        for peak, bound, buckets in seen:
            assert 0 < peak <= bound
            assert (buckets > 1) == (stage == 3)
