"""Schedulers under an engine: every group steps at its own rate, which is the one that the engine shows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.errors import UserError

from .harness import run_ranks
from .small_runs import Cell, full_weights, new_model, one_step, quiet

STEPS = 4
LR = 2.0**-7
PARAMS = {"lr": LR, "sign_lr_ratio": 8, "period": "inf", "weight_decay": 0.0}
"""Signs alone: what a weight moves by is the rate."""
RATIOS = [1.0, 1 / 8, 1 / 8]
LISTS = [LR, LR / 8, LR / 8]

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 2, "warmup_type": "linear"}}
SECTIONS: dict[str, dict[str, Any]] = {
    "WarmupLR": WARMUP,
    "WarmupLR of the optimizer's": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "WarmupLR by lists": {"type": "WarmupLR", "params": {**WARMUP["params"], "warmup_max_lr": LISTS}},
    "WarmupDecayLR": {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": 6}},
    "WarmupDecayLR by default": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 6}},
    "OneCycle": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": LR / 4, "cycle_max_lr": LR, "cycle_first_step_size": 2, "decay_lr_rate": 0.5},
    },
    "LRRangeTest": {
        "type": "LRRangeTest",
        "params": {"lr_range_test_min_lr": LR / 8, "lr_range_test_step_size": 1, "lr_range_test_step_rate": 1.0},
    },
    "WarmupCosineLR": {"type": "WarmupCosineLR", "params": {"total_num_steps": 6, "warmup_num_steps": 2}},
}
BOTH_WAYS = ("WarmupLR", "WarmupDecayLR by default", "OneCycle", "LRRangeTest")
TORCHS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 2)),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, LR / 4, LR, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, LR, total_steps=6, cycle_momentum=False),
}


def by_initialize(section: dict[str, Any], cell: Cell, world_size: int, **params: Any) -> Any:
    optimizer = {"type": "LionMuon", "params": {**PARAMS, **params}}
    config = {**cell.json(world_size, optimizer), "scheduler": section}
    return ds_optim.initialize(model=new_model(), config=config)[0]


def by_client(section: Any, cell: Cell, world_size: int, **params: Any) -> Any:
    """With a section in the JSON, or a function that makes the scheduler."""
    import deepspeed

    model = new_model()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), **{**PARAMS, **params})
    config = {**cell.json(world_size), "zero_allow_untested_optimizer": True}
    if callable(section):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config, lr_scheduler=section)[0]
    return deepspeed.initialize(model=model, optimizer=optimizer, config={**config, "scheduler": section})[0]


Steps = list[tuple[list[float], list[float]]]
"""(the rates that the engine shows before a step, how far it moved a matrix, the embedding and a gain)."""


def stepped(engine: Any, rank: int, world_size: int, steps: range = range(STEPS)) -> Steps:
    found = []
    before = full_weights(engine)
    for step in steps:
        shown = [float(lr) for lr in engine.get_lr()]
        one_step(engine, step, rank, world_size)
        after = full_weights(engine)
        far = [float((after[n] - before[n]).abs().max()) for n in ("square.weight", "embed.weight", "norm.weight")]
        found.append((shown, far))
        before = after
    return found


def all_schedules(rank: int, world_size: int) -> dict[str, Any]:
    quiet()
    found = {}
    for name, section in SECTIONS.items():
        cell = Cell(stage=2)
        if name in BOTH_WAYS:
            found[f"initialize {name}"] = stepped(by_initialize(section, cell, world_size), rank, world_size)
        found[f"client {name}"] = stepped(by_client(section, cell, world_size), rank, world_size)
    for name, make in TORCHS.items():
        found[f"client {name}"] = stepped(by_client(make, Cell(stage=2), world_size), rank, world_size)
    for stage in (0, 1, 3):
        found[f"client at stage {stage}"] = stepped(by_client(WARMUP, Cell(stage=stage), world_size), rank, world_size)
    found["initialize from lr 0"] = stepped(by_initialize(WARMUP, Cell(stage=2), world_size, lr=0), rank, world_size)
    found["client from lr 0"] = stepped(by_client(WARMUP, Cell(stage=3), world_size, lr=0), rank, world_size)
    return found


@pytest.fixture(scope="module")
def schedules() -> list[dict[str, Any]]:
    return run_ranks(2, all_schedules, timeout=300)


@pytest.mark.full
def test_every_group_steps_at_its_share_of_a_schedules_rate(schedules: list[dict[str, Steps]]) -> None:
    for name, steps in schedules[0].items():
        assert len({shown[0] for shown, _ in steps}) > 1, f"{name} never moved the rate"
        for shown, far in steps:
            matrix, aux, vector = shown
            # Sign steps of matrices take an eighth of their group's rate.
            assert far == pytest.approx([matrix / 8, aux, vector], rel=2e-3, abs=1e-7), name
            assert shown == pytest.approx([matrix * ratio for ratio in RATIOS], rel=1e-12), name
    assert schedules[0] == schedules[1]


@pytest.mark.full
def test_what_a_section_means_does_not_hang_on_the_way_in(schedules: list[dict[str, Steps]]) -> None:
    found = schedules[0]
    for name in BOTH_WAYS:
        assert found[f"initialize {name}"] == found[f"client {name}"], name
    alike = ("WarmupLR", "WarmupLR of the optimizer's", "WarmupLR by lists", "from lr 0", "at stage 0")
    assert [found[f"client {name}"][-1][0] for name in alike] == [LISTS] * len(alike)
    assert found["initialize from lr 0"] == found["initialize WarmupLR"]
    assert max(shown[0] for shown, _ in found["client WarmupDecayLR by default"]) == 1e-3, "DeepSpeed's own default"


# ------------------------------------------------------------------------------------ what initialize itself says


def meetings(rank: int, world_size: int) -> dict[str, str]:
    """What ``deepspeed.initialize`` prints, or refuses, of a client optimizer; nothing is stepped."""
    import deepspeed

    quiet()
    stage2 = Cell(stage=2)
    refused = Cell(stage=2, zero={"compute_grad_norm": False})
    zero = {"type": "Muon", "params": {"lr": 0.0}}

    def muon() -> Any:
        model = new_model()
        optimizer = ds_optim.Muon(ds_optim.param_groups(model), lr=0.0)
        config = {**stage2.json(world_size), "zero_allow_untested_optimizer": True, "scheduler": WARMUP}
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    wrong = {"type": "WarmupLR", "params": {**WARMUP["params"], "warmup_max_lr": [LR, LR]}}
    equal = {"type": "WarmupLR", "params": {**WARMUP["params"], "warmup_max_lr": [LR, LR, LR]}}
    cases: dict[str, Callable[[], Any]] = {
        "plain": lambda: by_client(WARMUP, stage2, world_size),
        "refused": lambda: by_client(WARMUP, refused, world_size),
        "lr 0": muon,
        "lr 0 in the JSON": lambda: ds_optim.initialize(
            model=new_model(), config={**stage2.json(world_size, zero), "scheduler": WARMUP}
        ),
        "two rates": lambda: by_initialize(wrong, stage2, world_size),
        "equal rates": lambda: str(by_client(equal, stage2, world_size).lr_scheduler.max_lrs),
    }
    found = {}
    for name, make in cases.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                made = make()
                print(made if isinstance(made, str) else "")
            except UserError as problem:
                print(problem)
        found[name] = said.getvalue()
    return found


def test_a_client_optimizer_meets_its_engine_in_initialize() -> None:
    """Refusals come before the first forward, and the routes show where the warmup from 0 leads."""
    first, second = run_ranks(2, meetings, timeout=200)
    assert f"matrix: lion_muon, lr {LR:g}" in first["plain"]
    assert f"vector: lion, lr {LR / 8:g}" in first["plain"]
    assert "WarmupLR's one rate is shared out" in first["plain"]
    assert "ds_optim" not in second["plain"]
    assert str([LR] * 3) in first["equal rates"], "a list of equal rates is meant"
    for found in (first, second):
        assert "compute_grad_norm" in found["refused"]
        for name in ("lr 0", "lr 0 in the JSON"):
            assert "lr of 0 does not tell the part of 'aux'" in found[name]
        assert "has 2 rates and the optimizer 3 parameter groups (matrix, aux, vector)" in found["two rates"]


# ------------------------------------------------------------------------------------------------------ resumed


def resumed(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Steps, Steps]]:
    """What four steps did, and what the last two did in a run that was resumed after two."""
    quiet()
    found = {}
    ways: dict[str, Any] = {**{name: SECTIONS[name] for name in ("WarmupLR", "OneCycle", "LRRangeTest")}, **TORCHS}
    for name, way in ways.items():
        for stage in (2, 3) if name == "WarmupLR" else (2,):
            place = folder / f"{name}-{stage}"
            engine = by_client(way, Cell(stage=stage), world_size)
            stepped(engine, rank, world_size, range(2))
            engine.save_checkpoint(str(place))
            whole = stepped(engine, rank, world_size, range(2, 4))
            again = by_client(way, Cell(stage=stage), world_size)
            again.load_checkpoint(str(place))
            found[f"{name} {stage}"] = whole, stepped(again, rank, world_size, range(2, 4))
    return found


@pytest.mark.full
def test_a_resumed_schedule_goes_on_with_each_groups_rate(tmp_path: Path) -> None:
    for found in run_ranks(2, resumed, tmp_path, timeout=200):
        for name, (whole, again) in found.items():
            assert [shown for shown, _ in again] == [shown for shown, _ in whole], name
            for (_, far), (_, there) in zip(again, whole, strict=True):
                assert far == pytest.approx(there), name
