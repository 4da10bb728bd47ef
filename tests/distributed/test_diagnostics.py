"""``diagnostics: true`` under ZeRO: the numbers are those of whole parameters, on every rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.updates import ParameterUpdate
from tests.cases import CASES, WITH_VARIANTS, update_of

from .harness import run_ranks
from .training import Run, random_gradients, train_plain, train_sharded

pytestmark = pytest.mark.full

# Every rule that tells of whole parameters, with gates and ratios of which some are open and some are not.
TOLD = [name for name, case in CASES.items() if isinstance(update_of(case, 0), ParameterUpdate)]
WATCHED = {
    name: Run(type=WITH_VARIANTS[name].type, params={**WITH_VARIANTS[name].params, "lr": 1e-2})
    for name in (*TOLD, "Lion", "MiMuon-some_closed", "MiMuon-gap")
}
WATCHED["StableLion"] = Run(type="StableLion", params={"lr": 1e-2, "trust_ratio_max": 0.2})
PLACES: dict[str, tuple[int, dict[str, int]]] = {
    "z1": (1, {}),
    "z3": (3, {}),
    "z3-sub_groups": (3, {"sub_group_size": 300}),
}
PLACED = [("z1", 2), ("z3", 2), ("z3-sub_groups", 2), ("z1", 3), ("z3", 3)]


def watched(run: Run) -> Run:
    return replace(run, steps=3, params={**run.params, "diagnostics": True})


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer.diagnostics


def watch_sharded(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, run in WATCHED.items():
        for place in (place for place, size in PLACED if size == world_size):
            stage, zero = PLACES[place]
            placed = replace(watched(run), stage=stage, zero=zero)
            found[f"{name} {place}"] = numbers_of(train_sharded(placed, rank, world_size, random_gradients).optimizer)
    return found


@cache
def under_zero(world_size: int) -> list[dict[str, dict[str, float]]]:
    """Of every rank."""
    return run_ranks(world_size, watch_sharded, timeout=300)


def watch_plain(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    return {name: numbers_of(train_plain(watched(run), random_gradients).optimizer) for name, run in WATCHED.items()}


@cache
def unsharded() -> dict[str, dict[str, float]]:
    return run_ranks(1, watch_plain, init=False)[0]


@pytest.mark.parametrize(("place", "world_size"), PLACED)
@pytest.mark.parametrize("name", WATCHED)
def test_diagnostics_are_those_of_the_unsharded_run(name: str, place: str, world_size: int) -> None:
    """On every rank, though each holds but slices."""
    expected = unsharded()[name]
    assert expected
    for found in under_zero(world_size):
        assert found[f"{name} {place}"] == pytest.approx(expected, rel=1e-6)


def test_the_numbers_compared_are_of_some_parameters_and_not_of_others() -> None:
    """A share that is 0 or 1 would be so of any slice."""
    for name, what in [
        ("StableLion", "saturated trust ratios"),
        ("CLion-tensor", "open gates"),
        ("MiMuon-some_closed", "open gates"),
        ("MiMuon-gap", "open gates"),
        ("CLion", "open gates"),
    ]:
        assert 0 < unsharded()[name][f"matrix/{what}"] < 1, name
