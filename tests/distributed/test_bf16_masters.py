"""bf16 master weights under ZeRO: the same bits at every stage and world size, no fp32 copy, resumed to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from ds_optim.sharding import binding

from .harness import run_ranks
from .training import Run, Weights, build_optimizer, new_model, random_gradients, train_sharded

STEPS = 4
MASTERS: dict[str, Any] = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}

# To add an optimizer, add a line.
OPTIMIZERS: dict[str, Run] = {
    "Lion": Run(type="Lion", params={"lr": 1e-3}),
    "Lion-bfloat16": Run(type="Lion", params={"lr": 1e-3, "momentum_dtype": "bfloat16"}),
    "SignSGD": Run(type="SignSGD", params={"lr": 1e-3}),
    "Muon-aux_adamw": Run(type="Muon", params={"polar": FP32, "aux": "adamw"}),
    "LionMuon": Run(type="LionMuon", params={"polar": FP32}),
    "LionMuon-bfloat16": Run(type="LionMuon", params={"polar": BF16, "momentum_dtype": "bfloat16"}),
    "CautiousLion": Run(type="CautiousLion", params={"lr": 1e-3}),
    "StableLion": Run(type="StableLion", params={"lr": 1e-3, "trust_ratio_max": 1e3}),
    "LASM-element": Run(type="LASM", params={"lr": 1e-3, "variance": "element"}),
    "StoSignSGD": Run(type="StoSignSGD", params={"lr": 1e-3}),
    "MiMuon-some_closed": Run(type="MiMuon", params={"polar": FP32, "tau": 2.0}),
    "SpectralLion": Run(type="SpectralLion", params={"lr": 1e-3, "basis": "weight"}),
    "Lamb": Run(type="Lamb", params={"lr": 1e-2}),
    "StableAdamW": Run(type="StableAdamW", params={"lr": 1e-3}),
}
PLACES = {2: ("z1", "z3"), 3: ("z2", "z3", "z3-sub_groups")}


def placed(run: Run, place: str) -> Run:
    zero = {"sub_group_size": 300} if place.endswith("sub_groups") else {}
    return replace(run, stage=int(place[1]), zero=zero, steps=STEPS, dtype="bf16", config=MASTERS)


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Weights]:
    """The weights of every run; on rank 0."""
    return {name: train_sharded(run, rank, world_size, random_gradients).weights for name, run in runs.items()}


@cache
def sharded(world_size: int) -> dict[str, Weights]:
    runs = {f"{name} {place}": placed(run, place) for name, run in OPTIMIZERS.items() for place in PLACES[world_size]}
    return run_ranks(world_size, train_all, runs, timeout=200)[0]


def train_all_plain(rank: int, world_size: int) -> dict[str, Weights]:
    """bf16 parameters stepped directly, which a user is refused: what asks for it is DeepSpeed's JSON."""
    binding._check_steppable = lambda tensor, name: None
    found = {}
    for name, run in OPTIMIZERS.items():
        model = new_model("bf16")
        optimizer = build_optimizer(run, model)
        for step in range(STEPS):
            for key, p in model.named_parameters():
                p.grad = random_gradients(step)[key].bfloat16()
            optimizer.step()
        found[name] = {key: p.detach().float() for key, p in model.named_parameters()}
    return found


@cache
def unsharded() -> dict[str, Weights]:
    return run_ranks(1, train_all_plain, init=False)[0]


@pytest.mark.parametrize(("world_size", "place"), [(size, place) for size, places in PLACES.items() for place in places])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_gradients_give_the_same_bits(world_size: int, place: str, name: str) -> None:
    one, other = sharded(world_size)[f"{name} {place}"], unsharded()[name]
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
