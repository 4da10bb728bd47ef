"""bf16 master weights under ZeRO: the same bits at every stage and world size, no fp32 copy, resumed to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.memory import account
from ds_optim.memory.account import MemoryAccount, parameter_count
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.sharding import binding
from tests.cases import WITH_VARIANTS
from tests.tiers import cells

from .harness import assert_all_raised, run_ranks
from .models import TinyNet, batch, share
from .small_runs import BATCH, LION, LION_MUON, Cell, differences, local_tensors, one_step, snapshot, start
from .training import Run, Weights, build_optimizer, new_model, random_gradients, train_sharded

STEPS = 4
MASTERS: dict[str, Any] = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
# An optimizer of each way through the package; --full adds AdamW beside matrices, and narrow momentum.
OPTIMIZERS = {
    name: Run(type=WITH_VARIANTS[name].type, params=WITH_VARIANTS[name].params)
    for name in cells(["Lion"], ["Muon-aux_adamw", "LionMuon-bfloat16"], WITH_VARIANTS)
    if "cautious_decay" not in WITH_VARIANTS[name].params
}
PLACES = dict(cells([(2, ("z1", "z3"))], [(3, ("z2", "z3-sub_groups"))]))


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


@pytest.mark.parametrize(
    ("world_size", "place"), [(size, place) for size, places in PLACES.items() for place in places]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_gradients_give_the_same_bits(world_size: int, place: str, name: str) -> None:
    one, other = sharded(world_size)[f"{name} {place}"], unsharded()[name]
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


# -------------------------------------------------------------------------------------------------- memory


FP32_GRADIENTS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
ADAMW = {"type": "adamw", "params": {"torch_adam": True}}
INT8 = {**LION_MUON, "params": {**LION_MUON["params"], "momentum_dtype": "int8"}}  # type: ignore[dict-item]
CASES: dict[str, tuple[Cell, Mapping[str, Any], dict[str, Any]]] = {
    **{f"z{s} lion": (Cell(stage=s, dtype="bf16", config=MASTERS), LION, {}) for s in (1, 2)},
    "z3 int8": (Cell(stage=3, dtype="bf16", config=MASTERS), INT8, {}),
    "z3 fp32 gradients": (
        Cell(stage=3, dtype="bf16", config={**MASTERS, **FP32_GRADIENTS}),
        LION,
        {"grad_accum_dtype": "fp32"},
    ),
    "z3 adamw": (Cell(stage=3, dtype="bf16", config=MASTERS), ADAMW, {}),
}


def count_all(rank: int, world_size: int) -> dict[str, MemoryAccount]:
    """What is held before the second step."""
    found = {}
    for name, (cell, optimizer, _) in CASES.items():
        engine = start(cell, world_size, optimizer)
        one_step(engine, 0, rank, world_size)
        tokens, targets = share(*batch(1, BATCH), rank, world_size)
        engine.backward(engine(tokens, targets))
        found[name] = account(engine)
        engine.destroy()
    return found


@cache
def counted() -> list[dict[str, MemoryAccount]]:
    return run_ranks(2, count_all, timeout=100)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_is_accounted(name: str) -> None:
    cell, optimizer, settings = CASES[name]
    model = shape_of_module("tiny", TinyNet().bfloat16())
    params = dict(optimizer["params"])
    dtype = params.pop("momentum_dtype", "float32")
    plan = plan_optimizer(model, optimizer["type"], params, momentum_dtype=dtype, device="cpu")
    zero = ZeroSettings(
        stage=cell.stage, ranks=2, accumulation=1, bf16_masters=True, param_persistence_threshold=0, **settings
    )
    for held, rank in zip((seen[name] for seen in counted()), estimate(model, plan, zero).ranks, strict=True):
        assert rank.model_states == pytest.approx(held.model_state_bytes, rel=0.02)
        assert rank.weights == held.weights
        assert rank.master == held.master
        assert rank.gradients == pytest.approx(held.gradients, abs=64), "but for a gradient norm"
        kept = dict(held.state)
        if "exp_avg_scale" in kept:  # a vector's one scale is counted among the scalars
            kept["exp_avg_scale"] += held.scalars
        assert rank.state == kept
        assert rank.padding == held.state_padding + held.master_padding


def seven_bytes(rank: int, world_size: int) -> tuple[MemoryAccount, int, set[torch.dtype]]:
    """What stage 3 holds with int8 momentum before a step, of a model whose matrices divide evenly."""
    params = {"lr": 1e-3, "momentum_dtype": "int8"}
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16()
    cell = Cell(stage=3, dtype="bf16", config=MASTERS)
    engine = start(cell, world_size, {"type": "Lion", "params": params}, model)
    for step in range(2):
        engine.backward(engine(torch.ones(2, 256).bfloat16()).float().sum())
        if step == 0:
            engine.step()
    return account(engine), parameter_count(engine.module), {t.dtype for t in local_tensors(engine)}


def test_stage_3_with_int8_momentum_holds_seven_bytes_a_parameter() -> None:
    """2 of weights, 2 of gradients, 2 of master weights, 1 of momentum and 1/64 of its scales.

    DeepSpeed 0.19 means master weights to share the weights' storage there, but compares a device with a string, so
    that they do not. Where they do, it is 5.02.
    """
    total = expected = 0.0
    for held, parameters, dtypes in run_ranks(2, seven_bytes):
        assert dtypes == {torch.bfloat16}
        mine = parameters // 2
        assert held.weights == 2 * mine
        assert held.gradients == pytest.approx(2 * mine, abs=16), "but for a gradient norm"
        assert held.master in (0, 2 * mine)
        assert held.state == {"exp_avg_codes": mine, "exp_avg_scale": mine // 64}
        expected += mine * (2 + 2 + 1 + 1 / 64) + held.master
        total += held.model_state_bytes
    assert total == pytest.approx(expected, abs=32)
    assert total / parameters <= 7.1


# ---------------------------------------------------------------------------------------------- checkpoints


CELLS = [(1, LION_MUON), (1, INT8), (3, LION), (3, INT8)]


def saved_and_loaded(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    """What differs, bit for bit, between a run and one that went on from its checkpoint."""
    found = {}
    for number, (stage, optimizer) in enumerate(CELLS):
        cell = Cell(stage=stage, dtype="bf16", config=MASTERS)
        engine = start(cell, world_size, optimizer)
        for step in range(2):
            one_step(engine, step, rank, world_size)
        engine.save_checkpoint(str(folder / str(number)))
        at_save = snapshot(engine)
        one_step(engine, 2, rank, world_size)
        after = snapshot(engine)
        engine.destroy()
        resumed = start(cell, world_size, optimizer, TinyNet(seed=9).bfloat16())
        resumed.load_checkpoint(str(folder / str(number)))
        found[f"{number} loaded"] = differences(at_save, snapshot(resumed))
        one_step(resumed, 2, rank, world_size)
        found[f"{number} resumed"] = differences(after, snapshot(resumed))
        found[f"{number} dtypes"] = sorted({str(v.dtype) for k, v in after.items() if k.startswith("master")})
        resumed.destroy()
    return found


@pytest.mark.full
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    for found in run_ranks(2, saved_and_loaded, tmp_path):
        for label, facts in found.items():
            assert facts == (["torch.bfloat16"] if label.endswith("dtypes") else []), label


# ------------------------------------------------------------------------------------------------ refusals


def client_step(rank: int, world_size: int) -> None:
    """A client optimizer whose config this package never saw, under a wrapper that keeps fp32 masters all the same."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    model = new_model("bf16")
    config = Cell(stage=1, dtype="bf16", config={**MASTERS, **FP32_GRADIENTS}).json(world_size)
    config["zero_allow_untested_optimizer"] = True
    optimizer = ds_optim.Lion(ds_optim.param_groups(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    one_step(engine, 0, rank, world_size)


@pytest.mark.full
def test_a_client_optimizer_is_refused_at_its_first_step() -> None:
    outcomes = run_ranks(2, client_step, expect_error=True)
    assert_all_raised(outcomes, "UserError", "bf16.bf16_master_weights_and_grads", "use stage 2")
