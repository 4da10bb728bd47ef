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

from tests.cases import CASES, WITH_VARIANTS
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


# (ranks, place, optimizer): every rule at one place; with --full all of them everywhere on three ranks, and on four at
# stages 1 and 3 by turns.
CELLS = cells(
    ((3, place, name) for place, name in _in_turn((*CASES, "LionMuon-bfloat16"), "z1", "z3", "z2", "z3-sub_groups")),
    [
        *((3, place, name) for place in PLACES for name in OPTIMIZERS),
        *((4, place, name) for place, name in _in_turn(OPTIMIZERS, "z1", "z3")),
    ],
    product((3, 4), PLACES, OPTIMIZERS),
)

IDENTITY_PLACES = cells(["z3"], ["z1"])
# One rule and its params, and another that it must be to the bit.
IDENTITIES: dict[str, tuple[Run, Run]] = {
    "LionMuon with period inf is Lion at lr/sign_lr_ratio": (
        Run(type="LionMuon", params={"lr": 0.01, "sign_lr_ratio": 8, "period": "inf", "weight_decay": 0.3}),
        Run(type="Lion", params={"lr": 0.01 / 8, "weight_decay": 0.3}),
    ),
    "LionMuon with period 1 and one beta is Muonlight without nesterov": (
        Run(type="LionMuon", params={"lr": 0.01, "period": 1, "betas": (0.95, 0.95), "aux_lr": 0.002}),
        Run(type="Muonlight", params={"lr": 0.01, "momentum": 0.95, "nesterov": False, "aux_lr": 0.002}),
    ),
    "SignMuon is LionMuon with one beta": (
        Run(type="SignMuon", params={"lr": 0.01, "beta": 0.8, "sign_lr_ratio": 20}),
        Run(type="LionMuon", params={"lr": 0.01, "betas": (0.8, 0.8), "sign_lr_ratio": 20}),
    ),
}


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


@cache
def identical_runs() -> dict[str, Weights]:
    """Both sides of each identity at two places, on two ranks."""
    pairs = {
        f"{name} {side} {place}": _placed(run, place)
        for name, both in IDENTITIES.items()
        for side, run in enumerate(both)
        for place in IDENTITY_PLACES
    }
    return run_ranks(2, train_all, pairs, timeout=300)[0]


def differing(one: Weights, other: Weights) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(("world_size", "place", "name"), CELLS)
def test_same_gradients_give_the_same_bits(world_size: int, place: str, name: str) -> None:
    assert differing(sharded(world_size)[f"{name} {place}"], unsharded()[name]) == []


@pytest.mark.parametrize("place", IDENTITY_PLACES)
@pytest.mark.parametrize("name", IDENTITIES)
def test_one_rule_is_another_under_zero(name: str, place: str) -> None:
    one, other = (identical_runs()[f"{name} {side} {place}"] for side in (0, 1))
    assert differing(one, other) == []


def test_rules_are_told_apart() -> None:
    """The comparisons above could not pass between any two rules."""
    assert differing(unsharded()["Lion"], unsharded()["Signum"])
    assert differing(unsharded()["Muon"], unsharded()["Muonlight"])
    assert differing(unsharded()["LionMuon"], unsharded()["SignMuon"])
