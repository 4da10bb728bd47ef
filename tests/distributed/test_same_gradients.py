"""With the same gradients in the flat partitions, every stage and world size gives the same bits.

The gradients that ZeRO reduced are replaced, in the partitions themselves, by known ones with full
mantissas, so that nothing but the optimizer can make a difference. No tolerance anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle, product

import pytest
import torch

from tests.cases import CASES, WITH_VARIANTS, one_of_each_kind
from tests.tiers import cells

from .harness import run_ranks
from .training import Run, Weights, random_gradients, train_plain, train_sharded

STEPS = 4
SUB_GROUPS = {"sub_group_size": 300}

OPTIMIZERS = {name: Run(type=case.type, params=case.params) for name, case in WITH_VARIANTS.items()}

PLACES: dict[str, Run] = {
    "z1": Run(type="", stage=1),
    "z2": Run(type="", stage=2),
    "z2-round_robin": Run(type="", stage=2, zero={"round_robin_gradients": True}),
    "z3": Run(type="", stage=3),
    "z3-sub_groups": Run(type="", stage=3, zero=SUB_GROUPS),
}


def _in_turn(names: Iterable[str], *places: str) -> Iterator[tuple[str, str]]:
    """Each with one of the places."""
    return zip(cycle(places), names)


# (ranks, place, optimizer): every rule at one place; with --full all of them at each stage on three ranks, and those of
# each kind where slices lie otherwise, and on four ranks, by turns.
CELLS = cells(
    ((3, place, name) for place, name in _in_turn((*CASES, "LionMuon-bfloat16"), "z1", "z3", "z2", "z3-sub_groups")),
    [
        *((3, place, name) for place in ("z1", "z2", "z3") for name in OPTIMIZERS),
        *((3, place, name) for place in ("z2-round_robin", "z3-sub_groups") for name in one_of_each_kind()),
        *((4, place, name) for place, name in _in_turn(one_of_each_kind(), "z1", "z3")),
    ],
    product((3, 4), PLACES, OPTIMIZERS),
)


def _placed(run: Run, place: str) -> Run:
    return replace(run, stage=PLACES[place].stage, zero=PLACES[place].zero, steps=STEPS)


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Weights]:
    """The weights of every run; on rank 0."""
    return {name: train_sharded(run, rank, world_size, random_gradients).weights for name, run in runs.items()}


@cache
def sharded(world_size: int) -> dict[str, Weights]:
    """Every optimizer at every place."""
    runs = {f"{name} {place}": _placed(OPTIMIZERS[name], place) for size, place, name in CELLS if size == world_size}
    return run_ranks(world_size, train_all, runs, timeout=300)[0]


def train_all_plain(rank: int, world_size: int) -> dict[str, Weights]:
    runs = {name: replace(OPTIMIZERS[name], steps=STEPS) for _, _, name in CELLS}
    return {name: train_plain(run, random_gradients).weights for name, run in runs.items()}


@cache
def unsharded() -> dict[str, Weights]:
    """Every optimizer without DeepSpeed, in a process like a rank: the bits of a product depend on its threads."""
    return run_ranks(1, train_all_plain, init=False)[0]


def differing(one: Weights, other: Weights) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(("world_size", "place", "name"), CELLS)
def test_same_gradients_give_the_same_bits(world_size: int, place: str, name: str) -> None:
    assert differing(sharded(world_size)[f"{name} {place}"], unsharded()[name]) == []


def test_rules_are_told_apart() -> None:
    """The comparisons above could not pass between any two rules."""
    assert differing(unsharded()["Lion"], unsharded()["Signum"])
    assert differing(unsharded()["Muon"], unsharded()["Muonlight"])
    assert differing(unsharded()["LionMuon"], unsharded()["SignMuon"])
