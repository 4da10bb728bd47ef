"""DeepSpeed's MoE layers: experts are sharded over fewer ranks than the rest, and each rank has other ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import ds_optim
from tests.tiers import cells

from .experts import MoENet, Weights, feed, given, one_step, start, weights_of
from .harness import run_ranks

STEPS = 3
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}


def chosen(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": 1e-2, **params}}


OPTIMIZERS = {
    "Lion": chosen("Lion"),
    "Muon": chosen("Muon", **FP32),
    "LionMuon bfloat16": chosen("LionMuon", momentum_dtype="bfloat16", **FP32),
    "NorMuon": chosen("NorMuon", **FP32),
    "LASM": chosen("LASM"),
    "MiMuon": chosen("MiMuon", tau=0.5, raw_lr=0.02, **FP32),
    "StableLion": chosen("StableLion", trust_ratio_max=1e3),
    "Dion2": chosen("Dion2", **FP32),
}
# (ranks, expert parallelism, stage, settings)
PLACES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "2x1 z2": (2, 1, 2, {}),
    "2x2 z0": (2, 2, 0, {}),
    "2x2 z1": (2, 2, 1, {}),
    "4x2 z1": (4, 2, 1, {}),
    "4x2 z2": (4, 2, 2, {}),
    "4x2 z2 round robin": (4, 2, 2, {"zero": {"round_robin_gradients": True}}),
    "4x4 z2": (4, 4, 2, {}),
    "4x2 z2 offload": (4, 2, 2, {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}),
}
CELLS = cells(
    [("4x2 z2", "LionMuon bfloat16"), ("4x2 z2", "LASM")],
    [(place, name) for place in PLACES for name in OPTIMIZERS if place.startswith("4x2 z") or name in ("LASM", "Muon")],
    [(place, name) for place in PLACES for name in OPTIMIZERS],
)


def sharded(rank: int, world_size: int, ep: int, stage: int, more: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Weights of each optimizer's run on given gradients, of the model that this rank holds."""
    found = {}
    for name in names:
        engine = start(stage, rank, world_size, ep, OPTIMIZERS[name], **more)
        feed(engine.basic_optimizer, [given(engine.module, rank, ep, step) for step in range(STEPS)])
        for step in range(STEPS):
            one_step(engine, step, rank)
        found[name] = weights_of(engine)
        engine.destroy()
    return found


@cache
def of_place(place: str) -> list[dict[str, Weights]]:
    ranks, ep, stage, more = PLACES[place]
    return run_ranks(ranks, sharded, ep, stage, more, [name for own, name in CELLS if own == place])


def plain(rank: int, world_size: int, ranks: int, ep: int, names: list[str]) -> list[dict[str, Weights]]:
    """The same without DeepSpeed: for each of ``ranks`` the dense parameters and its experts, on one process."""
    found = []
    for place in range(ranks):
        own = {}
        for name in names:
            model = MoENet(ep, place)
            optimizer = getattr(ds_optim, OPTIMIZERS[name]["type"])(
                ds_optim.param_groups(model), **OPTIMIZERS[name]["params"]
            )
            for step in range(STEPS):
                gradients = given(model, place, ep, step)
                for key, p in model.named_parameters():
                    p.grad = gradients[key].clone()
                optimizer.step()
            own[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
        found.append(own)
    return found


@cache
def unsharded(ranks: int, ep: int) -> list[dict[str, Weights]]:
    return run_ranks(1, plain, ranks, ep, list(OPTIMIZERS), init=False)[0]


@pytest.mark.parametrize(("place", "name"), CELLS)
def test_same_gradients_give_the_same_bits(place: str, name: str) -> None:
    """On every rank, of what all share and of the experts that it shares with some."""
    ranks, ep, _, _ = PLACES[place]
    for rank in range(ranks):
        here, there = of_place(place)[rank][name], unsharded(ranks, ep)[rank][name]
        assert [key for key in there if not torch.equal(here[key], there[key])] == [], f"rank {rank}"


@pytest.mark.full
def test_experts_are_told_apart() -> None:
    """What is compared above differs between the experts of two ranks."""
    one, other = (unsharded(4, 2)[rank]["Muon"] for rank in (0, 1))
    experts = [key for key in one if "deepspeed_experts" in key]
    assert len(experts) == 8
    assert all(not torch.equal(one[key], other[key]) for key in experts)
    assert all(torch.equal(one[key], other[key]) for key in one if key not in experts)
