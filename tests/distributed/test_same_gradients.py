"""With the same gradients in the flat partitions, every stage and world size gives the same bits.

The gradients that ZeRO reduced are replaced, in the partitions themselves, by known ones with full
mantissas, so that nothing but the optimizer can make a difference. No tolerance anywhere.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from .harness import run_ranks
from .training import Run, Weights, random_gradients, train_plain, train_sharded

STEPS = 4
SUB_GROUPS = {"sub_group_size": 300}
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}

# To add an optimizer, add a line.
OPTIMIZERS: dict[str, Run] = {
    "Lion": Run(type="Lion", params={"lr": 1e-3}),
    "SignSGD": Run(type="SignSGD", params={"lr": 1e-3}),
    "Signum": Run(type="Signum", params={"lr": 1e-3}),
    "Muon": Run(type="Muon", params={"polar": FP32}),
    "Muon-bf16": Run(type="Muon", params={"polar": BF16, "exchange": {"bucket_mb": 0.01}}),
    "Muon-aux_adamw": Run(type="Muon", params={"polar": FP32, "aux": "adamw"}),
    "Muonlight": Run(type="Muonlight", params={"polar": FP32, "aux": "signum"}),
    "NorMuon": Run(type="NorMuon", params={"polar": FP32}),
    "NorMuon-bfloat16": Run(type="NorMuon", params={"polar": BF16, "momentum_dtype": "bfloat16"}),
    "MuonH": Run(type="MuonH", params={"polar": FP32}),
    "LionMuon": Run(type="LionMuon", params={"polar": FP32}),
    "SignMuon": Run(type="SignMuon", params={"polar": FP32, "period": 3}),
    "LionMuon-random": Run(type="LionMuon", params={"polar": FP32, "period_mode": "random", "seed": 2}),
    "Lion-bfloat16": Run(type="Lion", params={"lr": 1e-3, "momentum_dtype": "bfloat16"}),
    "LionMuon-bfloat16": Run(type="LionMuon", params={"polar": FP32, "momentum_dtype": "bfloat16"}),
    "StoSignSGD-bfloat16": Run(type="StoSignSGD", params={"lr": 1e-3, "momentum_dtype": "bfloat16"}),
    "CautiousLion": Run(type="CautiousLion", params={"lr": 1e-3}),
    "CLion": Run(type="CLion", params={"lr": 1e-3, "nu": 0.1}),
    "CLion-tensor": Run(type="CLion", params={"lr": 1e-3, "nu": 0.001, "gate": "tensor"}),
    "StableLion": Run(type="StableLion", params={"lr": 1e-3, "trust_ratio_max": 1e3}),
    "LASM": Run(type="LASM", params={"lr": 1e-3}),
    "LASM-element": Run(type="LASM", params={"lr": 1e-3, "variance": "element"}),
    "StoSignSGD": Run(type="StoSignSGD", params={"lr": 1e-3}),
    "StoSignSGD-element": Run(type="StoSignSGD", params={"lr": 1e-3, "bound": "element", "seed": 5}),
    "MiMuon": Run(type="MiMuon", params={"polar": FP32}),
    "MiMuon-some_closed": Run(type="MiMuon", params={"polar": FP32, "tau": 2.0}),
    "MiMuon-all_closed": Run(type="MiMuon", params={"polar": FP32, "tau": 1e3, "raw_lr": 0.1}),
    "MiMuon-gap": Run(type="MiMuon", params={"polar": FP32, "tau": 8e-3, "gate": "singular_gap"}),
    "SpectralLion": Run(type="SpectralLion", params={"lr": 1e-3, "basis": "weight"}),
    "SpectralLion-momentum": Run(type="SpectralLion", params={"lr": 1e-3, "basis": "momentum", "polar": BF16}),
    "SpectralLion-gradient": Run(type="SpectralLion", params={"lr": 1e-3, "basis": "gradient"}),
    "SpectralLion-gradient-bfloat16": Run(
        type="SpectralLion", params={"lr": 1e-3, "basis": "gradient", "polar": BF16, "momentum_dtype": "bfloat16"}
    ),
    "Lion-cautious_decay": Run(type="Lion", params={"lr": 1e-2, "cautious_decay": True}),
    "NorMuon-cautious_decay": Run(type="NorMuon", params={"polar": FP32, "cautious_decay": True, "weight_decay": 5.0}),
    "LionMuon-bfloat16-cautious_decay": Run(
        type="LionMuon", params={"polar": FP32, "momentum_dtype": "bfloat16", "cautious_decay": True, "aux": "adamw"}
    ),
    "Lamb": Run(type="Lamb", params={"lr": 1e-2}),
    "StableAdamW": Run(type="StableAdamW", params={"lr": 1e-3}),
}

PLACES: dict[str, Run] = {
    "z1": Run(type="", stage=1),
    "z2": Run(type="", stage=2),
    "z2-round_robin": Run(type="", stage=2, zero={"round_robin_gradients": True}),
    "z3": Run(type="", stage=3),
    "z3-sub_groups": Run(type="", stage=3, zero=SUB_GROUPS),
}


def _places(name: str, world_size: int) -> tuple[str, ...]:
    """On four ranks stages 1 and 3 by turns, as three have all; all of it where DS_OPTIM_ALL_CELLS is set."""
    if world_size == 3 or os.environ.get("DS_OPTIM_ALL_CELLS"):
        return tuple(PLACES)
    return (("z1", "z3")[list(OPTIMIZERS).index(name) % 2],)


CELLS = [(size, place, name) for size in (3, 4) for name in OPTIMIZERS for place in _places(name, size)]

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
    runs = {name: replace(run, steps=STEPS) for name, run in OPTIMIZERS.items()}
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
        for place in ("z1", "z3")
    }
    return run_ranks(2, train_all, pairs, timeout=300)[0]


def differing(one: Weights, other: Weights) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(("world_size", "place", "name"), CELLS)
def test_same_gradients_give_the_same_bits(world_size: int, place: str, name: str) -> None:
    assert differing(sharded(world_size)[f"{name} {place}"], unsharded()[name]) == []


@pytest.mark.parametrize("place", ["z1", "z3"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_one_rule_is_another_under_zero(name: str, place: str) -> None:
    one, other = (identical_runs()[f"{name} {side} {place}"] for side in (0, 1))
    assert differing(one, other) == []


def test_rules_are_told_apart() -> None:
    """The comparisons above could not pass between any two rules."""
    assert differing(unsharded()["Lion"], unsharded()["Signum"])
    assert differing(unsharded()["Muon"], unsharded()["Muon-bf16"])
    assert differing(unsharded()["LionMuon"], unsharded()["SignMuon"])
