"""Each optimizer under ZeRO, 50 steps in fp32, against the fp64 reference: norms and counts are those of parameters.

The gradients are known ones, put into the flat partitions; the reference never hears of a partition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.tiers import ALL
from tests.unit.test_optimizers import (
    CASES,
    MATRIX_RULES,
    ROUNDING,
    for_package,
    for_reference,
    normwise,
    worst,
)

from .harness import run_ranks
from .training import Run, Weights, initial_weights, random_gradients, train_sharded

pytestmark = pytest.mark.full

STEPS = 50
# (stage, world size): each optimizer at one of them in turn; at all six, and in all its variants, where
# DS_OPTIM_ALL_CELLS is set. (test_same_gradients.py: all places agree with each other to the bit.)
PLACES = [(stage, world_size) for world_size in (2, 3) for stage in (1, 2, 3)]
# Weights here are not small: rates at which they go far from where they start, beside which fp32's rounding of the
# weights themselves is small.
RATES: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
LARGER = {"StableLion": {"lr": 1.0}, "Lamb": {"lr": 1.0}}
LABELS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


def _cells() -> list[tuple[int, int, int]]:
    """(number of the case, stage, world size)."""
    names = [name for name, _ in CASES]
    chosen = range(len(CASES)) if ALL else [names.index(name) for name in dict.fromkeys(names)]
    return [
        (number, stage, world_size)
        for turn, number in enumerate(chosen)
        for stage, world_size in PLACES
        if ALL or PLACES[turn % len(PLACES)] == (stage, world_size)
    ]


CELLS = _cells()


def hyper_of(number: int) -> tuple[str, dict[str, Any]]:
    name, own = CASES[number]
    own = {key: value for key, value in own.items() if key not in ("lr", "layer_scales")}
    aux = {"aux_lr": RATES["lr"]} if name in MATRIX_RULES else {}
    return name, {**RATES, **LARGER.get(name, {}), **own, **aux}


def train_all(rank: int, world_size: int, cells: list[tuple[int, int]]) -> dict[tuple[int, int], Weights]:
    """The weights of each (case, stage); on rank 0."""
    found = {}
    for number, stage in cells:
        name, hyper = hyper_of(number)
        run = Run(type=name, params=for_package(name, hyper), stage=stage, steps=STEPS)
        found[number, stage] = train_sharded(run, rank, world_size, cached_gradients).weights
    return found


@cache
def cached_gradients(step: int) -> Weights:
    return random_gradients(step)


@cache
def sharded(world_size: int) -> dict[tuple[int, int], Weights]:
    cells = [(number, stage) for number, stage, size in CELLS if size == world_size]
    return run_ranks(world_size, train_all, cells, timeout=60 + 10 * len(cells))[0]


@cache
def referred(number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The reference's weights, and where a sign was taken of next to nothing."""
    name, hyper = hyper_of(number)
    start = {key: w.double().numpy() for key, w in initial_weights("fp32").items()}
    entries = [{key: g.double().numpy() for key, g in random_gradients(step).items()} for step in range(STEPS)]
    masks = {key: np.zeros(w.shape, dtype=bool) for key, w in start.items()}

    def observe(key: str, step: int, state: reference.State) -> None:
        if "signed" in state:
            size = np.abs(state["signed"]).reshape(masks[key].shape)
            masks[key] |= size < ROUNDING * size.max()

    return reference.run(name, start, entries, for_reference(name, hyper), None, observe), masks


@pytest.mark.parametrize(
    ("number", "stage", "world_size"), CELLS, ids=[f"{LABELS[n]}-z{stage}-{size}ranks" for n, stage, size in CELLS]
)
def test_fifty_steps_under_zero_follow_the_reference(number: int, stage: int, world_size: int) -> None:
    ours = sharded(world_size)[number, stage]
    theirs, masks = referred(number)
    start = initial_weights("fp32")
    name, hyper = hyper_of(number)
    assert sum(int(mask.sum()) for mask in masks.values()) < 0.005 * sum(mask.size for mask in masks.values())
    for key, expected in theirs.items():
        kept = ~masks[key]
        error = (ours[key].double().numpy() - expected)[kept]
        displacement = (expected - start[key].double().numpy())[kept]
        matrix = name in MATRIX_RULES and expected.ndim == 2 and 1 not in expected.shape
        matrix = matrix and "embed" not in key and "lm_head" not in key
        if matrix and hyper.get("period") != "inf":
            assert normwise(error, displacement) < 1e-3, key
        else:
            assert worst(error, displacement) < 1e-6, key
