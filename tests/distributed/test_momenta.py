"""Momentum as numbers: what DeepSpeed's own functions and ``ds_optim.full_momentum`` hand out, and take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim.errors import UserError
from tests.tiers import cells

from .harness import run_ranks
from .models import TinyNet
from .resharding import gathered, held
from .small_runs import OFFLOAD, Cell, bits, new_model, one_step, own_optimizer, start

INT8 = [
    *(Cell(stage=stage) for stage in (0, 1, 2, 3)),
    Cell(stage=3, zero={"sub_group_size": 300}),
    Cell(stage=2, zero=OFFLOAD),
    Cell(stage=3, zero=OFFLOAD),
    Cell(stage=0, dtype="bf16"),
    Cell(stage=2, dtype="bf16"),
]
CELLS = cells(
    [(Cell(stage=1), "int8")],
    [
        *((cell, "int8") for cell in INT8),
        *((Cell(stage=stage), "bfloat16") for stage in (0, 1, 3)),
        *((Cell(stage=stage), "float32") for stage in (2, 3)),
    ],
)
LR = 2.0**-10
NAME = "fused.weight"


def optimizer(dtype: str) -> dict[str, Any]:
    return {"type": "Lion", "params": {"lr": LR, "weight_decay": 0.0, "momentum_dtype": dtype}}


def stock(engine: Any, stage: int, dtype: str) -> str | Tensor | None:
    """What DeepSpeed's function gives; at stages 1 and 2 not of int8, where ranks without a slice would wait."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage == 0 or (dtype == "int8" and stage < 3):
        return None
    try:
        found: Tensor = safe_get_full_optimizer_state(engine.module.fused.weight, "exp_avg")
        return found
    except KeyError as problem:
        return f"KeyError: {problem}"


def read_and_set(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    found = []
    for number, (cell, dtype) in enumerate(CELLS):
        engine = start(cell, world_size, optimizer(dtype))
        one_step(engine, 0, rank, world_size)
        parameter = engine.module.fused.weight
        seen = {
            "held": held(engine, cell, rank, world_size),
            "whole": {name: ds_optim.full_momentum(engine, p) for name, p in engine.module.named_parameters()},
            "stock": stock(engine, cell.stage, dtype),
        }
        place = str(folder / f"{number} {dtype}")
        engine.save_checkpoint(place)
        ds_optim.set_full_momentum(engine, parameter, torch.full((72, 24), 0.5))
        seen["set"] = {name: ds_optim.full_momentum(engine, p) for name, p in engine.module.named_parameters()}
        before = {n: v for n, what, _, v in held(engine, cell, rank, world_size) if what == "master"}
        one_step(engine, 1, rank, world_size)
        after = {n: v for n, what, _, v in held(engine, cell, rank, world_size) if what == "master"}
        seen["moved"] = (before[NAME] - after[NAME]).unique().tolist() if NAME in before else []
        engine.destroy()
        fresh = start(cell, world_size, optimizer(dtype), TinyNet(seed=9).to(next(new_model(cell.dtype).parameters())))
        fresh.load_checkpoint(place)
        again = ds_optim.full_momentum(fresh, fresh.module.fused.weight)
        seen["loaded"] = torch.equal(bits(again), bits(seen["whole"][NAME]))
        one_step(fresh, 1, rank, world_size)
        fresh.destroy()
        found.append(seen)
    return found


def test_momentum_is_handed_out_and_taken_as_numbers(tmp_path: Path) -> None:
    every = run_ranks(3, read_and_set, tmp_path, timeout=300)
    for number, (cell, dtype) in enumerate(CELLS):
        where = f"{cell.label} {dtype}"
        expected = gathered(rank[number]["held"] for rank in every)
        for seen in (rank[number] for rank in every):
            for name, values in seen["whole"].items():
                assert values.dtype == torch.float32
                assert torch.equal(values.view(-1), expected[name, "exp_avg"].float()), f"{where}: {name}"
                untouched = name != NAME
                assert torch.equal(seen["set"][name], values if untouched else torch.full((72, 24), 0.5)), where
            if dtype != "int8" and cell.stage:
                assert torch.equal(seen["stock"], seen["whole"][NAME]), where
            elif cell.stage == 3:
                assert seen["stock"] == "KeyError: 'exp_avg'", where
            # Its sign is the momentum's, which is far above any gradient: all of it steps down by lr.
            assert all(step == pytest.approx(LR, abs=1e-7) for step in seen["moved"]), where
            assert seen["loaded"], where
        assert any(rank[number]["moved"] for rank in every)


def nobodys(rank: int, world_size: int) -> list[str | None]:
    found: list[str | None] = []
    engine = start(Cell(stage=2), world_size, optimizer("int8"))
    weight = engine.module.fused.weight
    none = start(Cell(stage=2), world_size, {"type": "SignSGD", "params": {"lr": LR}})
    one_step(none, 0, rank, world_size)
    for ask in (
        lambda: ds_optim.full_momentum(engine, weight),
        lambda: ds_optim.full_momentum(torch.optim.SGD([weight], lr=1.0), weight),
        lambda: ds_optim.set_full_momentum(none, none.module.fused.weight, torch.zeros(72, 24)),
        lambda: one_step(engine, 0, rank, world_size),
        lambda: ds_optim.set_full_momentum(own_optimizer(engine), weight, torch.zeros(24, 72)),
    ):
        try:
            ask()
            found.append(None)
        except UserError as problem:
            found.append(str(problem))
    assert ds_optim.full_momentum(none, none.module.fused.weight) is None
    assert ds_optim.full_momentum(engine, torch.nn.Parameter(torch.zeros(3))) is None
    return found


def test_what_has_no_momentum_is_said() -> None:
    for before, other, nothing, stepped, shape in run_ranks(2, nobodys):
        assert "before its first step" in str(before)
        assert "SGD is no optimizer of ds_optim" in str(other)
        assert "keeps no momentum" in str(nothing)
        assert stepped is None
        assert "(72, 24)" in str(shape)
        assert "(24, 72)" in str(shape)


def alone(rank: int, world_size: int) -> str:
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = start(Cell(stage=2), world_size, optimizer("int8"))
    one_step(engine, 0, rank, world_size)
    try:
        return str(safe_get_full_optimizer_state(engine.module.fused.weight, "exp_avg"))
    except ValueError as problem:
        return str(problem)


@pytest.mark.full
def test_codes_are_never_handed_out_as_numbers() -> None:
    assert run_ranks(1, alone) == ["exp_avg not found in optimizer state fragment"]
