"""Ranks that share sequences: the unsharded bits, the losses and bytes of the same run without, checkpoints either way.

What is refused is shown to be broken in DeepSpeed with torch's AdamW.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_optim
from ds_optim.memory import account
from tests.cases import CASES, WITH_VARIANTS
from tests.tiers import cells

from .experts import MoENet
from .harness import assert_all_raised, run_ranks
from .models import batch, share
from .sequences import groups_of, one_step, start, train
from .small_runs import FP32_ACCUMULATION, LION_MUON, Cell, differences, new_model, quiet, snapshot
from .training import GLOBAL_BATCH, Run, Weights, random_gradients, start_engine, train_plain, train_sharded

# ------------------------------------------------------------------------------------------------------ bits

OPTIMIZERS = {
    name: Run(type=WITH_VARIANTS[name].type, params=WITH_VARIANTS[name].params, steps=4)
    for name in cells(["LionMuon"], ["Lion", "Muon-aux_adamw", "StoSignSGD", "Lamb"], WITH_VARIANTS)
}


def train_all(rank: int, world_size: int, stage: int) -> dict[str, Weights]:
    """The weights of every optimizer, two ranks to a sequence; on rank 0."""
    mpu = groups_of(2)
    return {
        name: train_sharded(replace(run, stage=stage, mpu=mpu), rank, world_size, random_gradients).weights
        for name, run in OPTIMIZERS.items()
    }


def train_all_plain(rank: int, world_size: int) -> dict[str, Weights]:
    return {name: train_plain(run, random_gradients).weights for name, run in OPTIMIZERS.items()}


@cache
def unsharded() -> dict[str, Weights]:
    return run_ranks(1, train_all_plain, init=False)[0]


@pytest.mark.parametrize(("world_size", "stage"), cells([(2, 3)], [(2, 0), (2, 1), (2, 2), (4, 1), (4, 2), (4, 3)]))
def test_same_gradients_give_the_same_bits(world_size: int, stage: int) -> None:
    found = run_ranks(world_size, train_all, stage, timeout=200)[0]
    for name, weights in found.items():
        assert [key for key in weights if not torch.equal(weights[key], unsharded()[name][key])] == [], name


# ---------------------------------------------------------------------------------------------------- losses


def train_stages(rank: int, world_size: int, sequence: int, family: str, stages: tuple[int, ...]) -> list[list[float]]:
    config = {"sequence_parallel_size": sequence}
    return [train(rank, world_size, config, stage, "LionMuon", 10, family) for stage in stages]


@pytest.mark.full
@pytest.mark.parametrize(("world_size", "family"), cells([], [(2, "Qwen3"), (4, "Llama")], [(2, "Llama")]))
def test_losses_are_those_of_whole_sequences(world_size: int, family: str) -> None:
    """Attention over cut sequences adds up in another order, and gradients are twice as large at stages 0 to 2."""
    stages = (0, 1, 2, 3) if world_size == 2 else (1, 3)
    whole, cut = (run_ranks(world_size, train_stages, size, family, stages, timeout=200)[0] for size in (1, 2))
    for one, other in zip(whole, cut, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
        assert one[0] - one[-1] > 1.0


def first_gradients(rank: int, world_size: int, stage: int, sequence: int, zero: dict[str, Any]) -> float:
    """The norm of the gradient that torch's AdamW steps with, all of it."""
    engine = start(stage, sequence, world_size, {"type": "AdamW", "params": {}}, zero_optimization=zero)
    squares: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        squares.extend(t.grad.double().square().sum() for group in optimizer.param_groups for t in group["params"])

    engine.basic_optimizer.register_step_pre_hook(keep)
    one_step(engine, 0, sequence, rank, world_size)
    total = torch.stack(squares).sum()
    if stage:
        dist.all_reduce(total)
    return float(total.sqrt())


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "zero", "times"), [(0, {}, 2), (1, {}, 2), (2, {}, 2), (2, {"reduce_scatter": False}, 2), (3, {}, 1)]
)
def test_deepspeed_hands_over_the_gradients_that_the_docs_say(stage: int, zero: dict[str, Any], times: int) -> None:
    """The mean's, or as many times as ranks share a sequence: what gradient_clipping then measures."""
    whole, cut = (run_ranks(2, first_gradients, stage, sequence, zero)[0] for sequence in (1, 2))
    assert cut == pytest.approx(times * whole, rel=1e-5)


@pytest.mark.full
def test_without_reduce_scatter_at_stage_3_deepspeed_divides_some_gradients_by_more() -> None:
    whole, cut = (run_ranks(2, first_gradients, 3, size, {"reduce_scatter": False})[0] for size in (1, 2))
    assert 1.1 * whole < cut < 1.9 * whole


# ----------------------------------------------------------------------------------------------------- bytes


def bytes_of(rank: int, world_size: int, stage: int, cut: bool, name: str) -> tuple[int, int]:
    """(of state, sent by the optimizer) over four steps."""
    params = {**CASES[name].params, "exchange": {"costs": "modelled"}, "momentum_dtype": "int8"}
    run = Run(type=name, params=params, stage=stage, mpu=groups_of(2) if cut else None)
    engine, _ = start_engine(run, world_size)
    for step in range(4):
        engine.backward(engine(*share(*batch(step, GLOBAL_BATCH), rank, world_size)))
        engine.step()
    kept = account(engine)
    return kept.state_bytes, engine.basic_optimizer._binding.comm.sent_bytes


@pytest.mark.full
@pytest.mark.parametrize(("world_size", "stage"), [(2, 1), (4, 2), (4, 3)])
def test_state_and_bytes_are_those_of_as_many_data_parallel_ranks(world_size: int, stage: int) -> None:
    """Which test_state_and_bytes.py holds against their formulas."""
    cut, whole = (run_ranks(world_size, bytes_of, stage, cut, "LionMuon", timeout=100) for cut in (True, False))
    assert cut == whole
    assert all(state > 0 and sent > 0 for state, sent in cut)


# ----------------------------------------------------------------------------------------------- checkpoints


def leave(rank: int, world_size: int, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """A checkpoint of stage 2; what differs after it from the run that went on, and the state that was saved."""
    engine = start(2, 2, world_size, LION_MUON)
    for step in range(3):
        one_step(engine, step, 2, rank, world_size)
    engine.save_checkpoint(str(folder))
    saved = snapshot(engine)
    one_step(engine, 3, 2, rank, world_size)
    whole = snapshot(engine)
    again = start(2, 2, world_size, LION_MUON, mpu=engine.mpu)
    again.load_checkpoint(str(folder))
    one_step(again, 3, 2, rank, world_size)
    return differences(whole, snapshot(again)), saved


def take_up(rank: int, world_size: int, folder: Path, at: Path) -> tuple[dict[str, Any], list[str], float]:
    """The same without shared sequences: the state loaded, and the loss after it is cut anew for stage 3."""
    engine = start(2, 1, world_size, LION_MUON)
    engine.load_checkpoint(str(folder))
    loaded = snapshot(engine)
    ours = one_step(engine, 3, 1, rank, world_size)
    other = start(3, 1, world_size, LION_MUON)
    ds_optim.load_checkpoint(other, str(folder))
    theirs = one_step(other, 3, 1, rank, world_size)
    other.save_checkpoint(str(at))
    return loaded, [] if ours == theirs else ["loss"], theirs


def come_back(rank: int, world_size: int, at: Path) -> list[float]:
    """On as many ranks as there are, two to a sequence again: from stage 3 without to stage 1 with."""
    engine = start(1, 2, world_size, LION_MUON)
    ds_optim.load_checkpoint(engine, str(at))
    return [one_step(engine, step, 2, rank, world_size) for step in (4, 5)]


@pytest.mark.full
def test_checkpoints_are_those_of_as_many_data_parallel_ranks(tmp_path: Path) -> None:
    folder, at = tmp_path / "cut", tmp_path / "whole"
    left = run_ranks(2, leave, folder)
    taken = run_ranks(2, take_up, folder, at)
    for (differ, saved), (loaded, changed, _) in zip(left, taken, strict=True):
        assert differ == []
        assert differences(saved, loaded) == []
        assert changed == []
    two, four = (run_ranks(ranks, come_back, at)[0] for ranks in (2, 4))
    assert four == pytest.approx(two, abs=1e-5)


# --------------------------------------------------------------------------------------------------- refused


def started(rank: int, world_size: int, how: str) -> None:
    quiet()
    model, config = new_model("bf16" if how == "sums" else "fp32"), Cell(stage=1).json(world_size)
    arguments: dict[str, Any] = {}
    if how in ("mpu", "client mpu", "sums", "no reduce-scatter", "AutoTP beside it", "experts"):
        arguments["mpu"] = groups_of(2)
    if how == "sums":
        config |= {"bf16": {"enabled": True}, **FP32_ACCUMULATION}
    elif how == "no reduce-scatter":
        config["zero_optimization"] |= {"stage": 3, "reduce_scatter": False}
    elif how == "mesh":
        arguments["mesh_param"] = (1, 2)
    elif how == "a mesh of the config":
        config |= {"sequence_parallel_size": 2, "data_parallel_size": 1}
    elif how == "experts":
        model = MoENet(2, rank)
    elif how == "AutoTP beside it":
        config["tensor_parallel"] = {"autotp_size": 2}
    else:
        config["sequence_parallel_size"] = {"mpu": 4, "client mpu": 4}.get(how, 2)
    if how.startswith("client"):
        import deepspeed

        config["zero_allow_untested_optimizer"] = True
        optimizer = ds_optim.Lion(ds_optim.param_groups(model))
        deepspeed.initialize(model=model, optimizer=optimizer, config=config, **arguments)
    ds_optim.initialize(model=model, config={**config, "optimizer": {"type": "Lion", "params": {}}}, **arguments)


REFUSED = {
    "sums": "grad_accum_dtype = fp32 is not supported at stage 1 with sequence_parallel_size above 1",
    "no reduce-scatter": "zero_optimization.reduce_scatter = false is not supported at stage 3",
    "mesh": "a mesh is not supported",
    "a mesh of the config": "a mesh is not supported",
    "AutoTP beside it": "sequence and tensor parallelism together are not supported",
    "experts": "experts in groups of their own are not supported beside sequence parallelism",
    "mpu": "sequence_parallel_size = 4, and the mpu shares a sequence among 2 ranks: write 2",
    "client mpu": "sequence_parallel_size = 4, and the mpu shares a sequence among 2 ranks: write 2",
    "client config alone": "sequence_parallel_size = 2 alone",
    "config alone": "sequence_parallel_size = 2 alone",
}


@pytest.mark.parametrize("how", cells(["mesh", "client config alone"], REFUSED))
def test_what_deepspeed_makes_something_else_of_is_refused(how: str) -> None:
    assert_all_raised(run_ranks(2, started, how, expect_error=True), "UserError", REFUSED[how])


def step_under_a_mesh(rank: int, world_size: int) -> torch.Tensor:
    import deepspeed

    quiet()
    model = new_model()
    config = {**Cell(stage=1).json(world_size), "zero_allow_untested_optimizer": True}
    adamw = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=adamw, config=config, mesh_param=(1, world_size))[0]
    engine.backward(engine(*share(*batch(0, 12), rank, world_size)))
    engine.step()
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


@pytest.mark.full
def test_over_a_mesh_adamws_weights_move_apart() -> None:
    one, other = run_ranks(2, step_under_a_mesh)
    assert float((one - other).abs().max()) > 1e-4


def step_with_sums(rank: int, world_size: int) -> None:
    more = {"bf16": {"enabled": True}, **FP32_ACCUMULATION}
    one_step(start(1, 2, world_size, {"type": "AdamW", "params": {}}, **more), 0, 2, rank, world_size)


@pytest.mark.full
def test_sums_in_fp32_fail_in_deepspeed_with_adamw() -> None:
    outcomes = run_ranks(2, step_with_sums, expect_error=True, timeout=60)
    assert "stack expects a non-empty TensorList" in outcomes[1].message
