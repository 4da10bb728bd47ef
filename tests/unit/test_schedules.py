"""Torch's and transformers' schedulers: each group steps at what stands in it, at its own share of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.routing import AUX, VECTOR
from ds_optim.zero.schedulers import prepare_scheduler, share_config
from tests.stepping import SmallModel, take_steps, weights_of

LR, RATIO, STEPS = 2.0**-6, 8.0, 8
ONES = {name: torch.ones(p.shape) for name, p in SmallModel().named_parameters()}

Make = Callable[[torch.optim.Optimizer], Any]


def lion_muon(model: SmallModel, lr: float = LR) -> ds_optim.LionMuon:
    """Sign steps alone: what a weight moves by is the rate."""
    groups = ds_optim.param_groups(model)
    return ds_optim.LionMuon(groups, lr=lr, sign_lr_ratio=RATIO, period="inf", weight_decay=0.0)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def stepped(model: SmallModel, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[list[float]]:
    """The rates of each step, each of which every group has moved by."""
    found = []
    for _ in range(steps):
        before = weights_of(model)
        take_steps(model, optimizer, [ONES])
        rates = rates_of(optimizer)
        far = [float(np.abs(weights_of(model)[n] - before[n]).max()) for n in ("square.weight", "embed.weight", "gain")]
        assert far == pytest.approx([rates[0] / RATIO, *rates[1:]], rel=2e-3, abs=1e-7)
        found.append(rates)
        schedule.step(*([1.0] if type(schedule).__name__ in BY_LOSS else []))
    return found


BY_LOSS = ("ReduceLROnPlateau", "GreedyLR")


def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


TORCHS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 3)),
    "LambdaLR of numpy's": lambda o: lr_scheduler.LambdaLR(o, lambda step: np.cos(step / 6)),
    "OneCycleLR by one rate": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=9, cycle_momentum=False),
    "OneCycleLR by lists": lambda o: lr_scheduler.OneCycleLR(o, rates_of(o), total_steps=9, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "SequentialLR": sequence,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR by lists": lambda o: lr_scheduler.CyclicLR(
        o, [lr / 4 for lr in rates_of(o)], rates_of(o), step_size_up=3, cycle_momentum=False
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
}


def transformers_kinds() -> dict[str, Make]:
    from transformers import SchedulerType, get_scheduler

    own: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": LR / 4},
        "cosine_warmup_with_min_lr": {"min_lr": LR / 4},
        "warmup_stable_decay": {"num_decay_steps": 3},
        "polynomial": {"lr_end": LR / 16},
        "reduce_lr_on_plateau": {"patience": 1},
        "greedy": {"min_lr": 0.0, "patience": 1},
    }

    def make(kind: Any) -> Make:
        options = own.get(kind.value, {})
        return lambda o: get_scheduler(kind, o, 2, STEPS, scheduler_specific_kwargs=options)

    return {kind.value: make(kind) for kind in SchedulerType}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_schedulers_move_each_group(name: str) -> None:
    check(TORCHS[name])


def test_transformers_schedulers_move_each_group() -> None:
    kinds = transformers_kinds()
    assert {"linear", "cosine", "cosine_with_min_lr", "polynomial", "inverse_sqrt"} <= set(kinds)
    for name, make in kinds.items():
        try:
            check(make, moves=not name.startswith("constant"))
        except AssertionError as problem:
            raise AssertionError(name) from problem


def check(make: Make, *, moves: bool = True) -> None:
    """Every step goes by what stands in the groups, in the proportion in which they were built; a resumed run too."""
    model = SmallModel()
    optimizer = lion_muon(model)
    schedule = make(optimizer)
    first = stepped(model, optimizer, schedule, 3)
    saved, place = optimizer.state_dict(), schedule.state_dict()
    again = lion_muon(model)
    going_on = make(again)
    again.load_state_dict(saved)
    going_on.load_state_dict(place)
    rest = stepped(model, again, going_on, STEPS - 3)
    assert rest == stepped(model, optimizer, schedule, STEPS - 3)
    for rates in (*first, *rest):
        assert rates == pytest.approx([rates[0], rates[0] / RATIO, rates[0] / RATIO], rel=1e-9)
    assert not moves or len({rates[0] for rates in (*first, *rest)}) > 1


def test_a_function_for_each_group() -> None:
    model = SmallModel()
    optimizer = lion_muon(model)
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: 0.5**step, lambda step: float(step)])
    rates = stepped(model, optimizer, schedule, 3)
    assert rates == [[LR, LR / 8 * 0.5**step, LR / 8 * step] for step in range(3)]


# --------------------------------------------------------------------------------- one value in all the groups


def test_one_rate_that_nothing_tells_the_origin_of_is_stepped_with_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's contract; CyclicLR's one value, which it alone knows, comes to the same."""
    for label in ("by hand", "CyclicLR"):
        model = SmallModel()
        optimizer = lion_muon(model)
        if label == "CyclicLR":
            schedule: Any = lr_scheduler.CyclicLR(optimizer, LR / 2, LR, step_size_up=3, cycle_momentum=False)
        else:
            schedule = SimpleNamespace(step=lambda: None)
            for group in optimizer.param_groups:
                group["lr"] = LR / 2
        assert stepped(model, optimizer, schedule, 2)[0] == [LR / 2] * 3
        assert capsys.readouterr().out.count(f"all parameter groups (matrix, aux, vector) step at lr {LR / 2:g}") == 1


def test_one_rate_is_no_mistake_where_all_were_built_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = SmallModel()
    groups = ds_optim.param_groups(model)
    optimizer = ds_optim.LionMuon(groups, lr=LR, aux_lr=LR, sign_lr_ratio=RATIO, period="inf", weight_decay=0.0)
    schedule = lr_scheduler.OneCycleLR(optimizer, LR, total_steps=9, cycle_momentum=False)
    assert all(len(set(rates)) == 1 for rates in stepped(model, optimizer, schedule, 4))
    assert "lr" not in capsys.readouterr().out.partition("gain: 7")[2]


@pytest.mark.parametrize("one", [True, False])
def test_a_first_rate_of_0_hides_no_share(one: bool) -> None:
    """OneCycleLR writes its own; LionMuon's aux rule has a part of any rate, another's absolute rate has none."""
    model = SmallModel()
    optimizer = lion_muon(model, lr=0.0)
    peaks: Any = LR if one else [LR, LR / RATIO, LR / RATIO]
    schedule = lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=9, cycle_momentum=False)
    for rates in stepped(model, optimizer, schedule, 4):
        assert rates == pytest.approx([rates[0], rates[0] / RATIO, rates[0] / RATIO])
    muon = ds_optim.Muon(ds_optim.param_groups(model), lr=0.0)
    assert muon.lr_ratios == [1.0, None, None]
    lr_scheduler.OneCycleLR(muon, LR, total_steps=9, cycle_momentum=False)
    before = weights_of(model)
    with pytest.raises(UserError, match="does not tell the part of 'aux'"):
        take_steps(model, muon, [ONES])
    assert all(np.array_equal(before[name], now) for name, now in weights_of(model).items())


def test_own_rates_take_their_share_of_a_configs_schedule() -> None:
    groups = ds_optim.param_groups(SmallModel())
    for group in groups:
        group["lr"] = {AUX: LR / 2, VECTOR: 0.0}.get(group["role"], LR)
    optimizer = ds_optim.Muon(groups, lr=2 * LR)
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": "auto"}}}
    assert share_config(config, optimizer) == [0.5, 0.25, 0.0]
    params = config["scheduler"]["params"]
    assert params == {"warmup_max_lr": [0.5, 0.25, 0.0], "warmup_min_lr": [0.0] * 3, "warmup_num_steps": "auto"}
    for untouched in ({}, {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}):
        before = dict(untouched)
        assert share_config(untouched, optimizer) is None
        assert untouched == before


def test_a_schedulers_own_bases_of_the_first_release_are_each_groups() -> None:
    """It had one rate in all groups, and so has the state of its schedulers."""
    model = SmallModel()
    optimizer = lion_muon(model)
    schedule = sequence(optimizer)
    saved, place = optimizer.state_dict(), schedule.state_dict()
    for group, ratio in zip(saved["param_groups"], (1, 1 / 8, 1 / 8), strict=True):
        group.update(lr=group["lr"] / ratio, initial_lr=LR, lr_scale=ratio)
    place = {**place, "_schedulers": [{**one, "base_lrs": [LR] * 3} for one in place["_schedulers"]]}
    again = lion_muon(model)
    going_on = sequence(again)
    again.load_state_dict(saved)
    going_on.load_state_dict(place)
    prepare_scheduler(SimpleNamespace(lr_scheduler=going_on), again, again.param_groups)
    assert stepped(model, again, going_on, STEPS) == stepped(model, optimizer, schedule, STEPS)
