"""Torch's own habits around an optimizer: its schedulers, numbers, and groups that are added before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.routes import routes
from tests.stepping import SmallModel, random_grads, take_steps

LR = 2.0**-6
RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "sign_lr_ratio": ({"sign_lr_ratio": 8}, [LR, LR / 8, LR / 8]),
    "aux_lr": ({"aux_lr": LR / 4}, [LR, LR / 4, LR / 4]),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: step / 3),
    "LambdaLR of one function": lambda o: schedulers.LambdaLR(o, [lambda step: step / 3] * len(o.param_groups)),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=3),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, LR, total_steps=6, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LambdaLR(o, lambda step: step / 2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.5)]
    ),
}


def rates_of_steps(optimizer: Any, model: nn.Module, schedule: Any, steps: int = 4) -> list[list[float]]:
    """The rate that each group has in each step."""
    seen: list[list[float]] = []
    seen_by = optimizer.register_step_post_hook(lambda o, *_: seen.append([float(g["lr"]) for g in o.param_groups]))
    for step in range(steps):
        take_steps(model, optimizer, random_grads(1, seed=step))
        schedule.step(*([1.0] if isinstance(schedule, schedulers.ReduceLROnPlateau) else []))
    seen_by.remove()
    return seen


@pytest.mark.parametrize("ratio", RATES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_group_follows_a_schedule_by_its_own_base(name: str, ratio: str) -> None:
    options, base = RATES[ratio]
    model = SmallModel()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), lr=LR, **options)
    seen = rates_of_steps(optimizer, model, SCHEDULES[name](optimizer))
    assert len({rates[0] for rates in seen}) > 2, "the schedule never moved the rate"
    for rates in seen:
        assert rates == pytest.approx([rates[0] * own / LR for own in base], rel=1e-12)


def test_a_function_for_each_group_is_each_groups_own() -> None:
    model = SmallModel()
    optimizer = ds_optim.Muon(ds_optim.param_groups(model), lr=0.25, aux_lr=0.5)
    schedule = schedulers.LambdaLR(optimizer, [lambda step: step, lambda step: 1.0, lambda step: 2.0])
    assert rates_of_steps(optimizer, model, schedule, 3) == [[0.0, 0.5, 1.0], [0.25, 0.5, 1.0], [0.5, 0.5, 1.0]]


def test_the_one_rate_of_swalr_is_shared_out() -> None:
    """Before, matrices and aux parameters ended at one rate, which only was said."""
    model = SmallModel()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), lr=LR, sign_lr_ratio=8)
    schedule = SWALR(optimizer, LR / 2, anneal_epochs=2)
    seen = rates_of_steps(optimizer, model, schedule)
    for rates in seen:
        assert rates == pytest.approx([rates[0], rates[0] / 8, rates[0] / 8], rel=1e-12)
    assert seen[-1][0] == LR / 2


@pytest.mark.parametrize("lr", [torch.tensor(LR), np.float64(LR), np.array(LR), torch.tensor(LR, dtype=torch.float64)])
def test_a_rate_may_be_anybodys_number(lr: Any) -> None:
    """At construction, and written into a group by a scheduler or a user."""
    first, second = SmallModel(), SmallModel()
    plain = ds_optim.LionMuon(ds_optim.param_groups(first), lr=LR)
    other = ds_optim.LionMuon(ds_optim.param_groups(second), lr=lr)
    assert other.defaults["lr"] == LR
    for step in range(3):
        for group in plain.param_groups:
            group["lr"] = group["lr"] / 2
        for group in other.param_groups:
            group["lr"] = type(lr)(group["lr"] / 2) if isinstance(lr, np.float64) else lr * 0 + group["lr"] / 2
        take_steps(first, plain, random_grads(1, seed=step))
        take_steps(second, other, random_grads(1, seed=step))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# --------------------------------------------------------------------------------------- groups that are added


def halves() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, and its two halves."""
    both = nn.ModuleDict({"one": SmallModel(), "two": SmallModel(seed=1)})
    return both, both["one"], both["two"]


def test_groups_that_are_added_before_the_first_step_are_as_if_they_had_been_there() -> None:
    both, one, two = halves()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(one), lr=LR, weight_decay=0.1, sign_lr_ratio=8)
    for group in ds_optim.param_groups(two):
        optimizer.add_param_group({**group, **({"lr": LR / 2} if group["name"] == "matrix" else {})})
    assert [group["name"] for group in optimizer.param_groups] == [
        *("matrix", "aux", "vector"),
        *("matrix 2", "aux 2", "vector 2"),
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR / 8, LR / 8, LR / 2, LR / 8, LR / 8]
    assert optimizer.built_rates == [group["lr"] for group in optimizer.param_groups]
    assert optimizer.lr_ratios == [1, 1 / 8, 1 / 8, 1 / 2, 1 / 8, 1 / 8]
    assert len([line for line in routes(optimizer) if line.startswith("  matrix")]) == 2
    apart = copy.deepcopy(both)
    alone = ds_optim.LionMuon(ds_optim.param_groups(apart["one"]), lr=LR, weight_decay=0.1, sign_lr_ratio=8)
    rest = ds_optim.LionMuon(ds_optim.param_groups(apart["two"]), lr=LR, weight_decay=0.1, sign_lr_ratio=8)
    rest.param_groups[0]["lr"] = LR / 2
    for grads in random_grads(3):
        for model in (one, two, apart["one"], apart["two"]):
            for name, p in model.named_parameters():
                p.grad = grads[name].clone()
        for built in (optimizer, alone, rest):
            built.step()
    for (name, p), q in zip(both.named_parameters(), apart.parameters(), strict=True):
        assert torch.equal(p, q), name
    again = ds_optim.LionMuon(ds_optim.param_groups(one), lr=LR, sign_lr_ratio=8)
    with pytest.raises(UserError):
        again.load_state_dict(optimizer.state_dict())
    for group in ds_optim.param_groups(two):
        again.add_param_group(group)
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_plain_groups_are_added_where_the_rule_asks_for_no_names() -> None:
    _, one, two = halves()
    optimizer = ds_optim.Lion(one.parameters(), lr=LR)
    twin = copy.deepcopy(optimizer)
    for built in (optimizer, twin):
        built.add_param_group({"params": two.parameters(), "lr": LR / 2})
        assert [group["lr"] for group in built.param_groups][-1] == LR / 2


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (lambda one, two: {"params": list(two.parameters())}, "must come from ds_optim.param_groups(model)"),
        (lambda one, two: ds_optim.param_groups(one)[0], "in the parameter groups 'matrix' and 'matrix 2'"),
        (lambda one, two: {**ds_optim.param_groups(two)[0], "perod": 2}, "did you mean 'period'"),
    ],
)
def test_a_group_that_cannot_be_added_gets_a_line_and_changes_nothing(added: Any, said: str) -> None:
    _, one, two = halves()
    two = nn.ModuleDict({"linear": nn.Linear(4, 4)}) if said.startswith("must") else two
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(one), lr=LR)
    with pytest.raises(UserError) as refused:
        optimizer.add_param_group(added(one, two))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(optimizer.param_groups) == len(optimizer.members) == 3
    take_steps(one, optimizer, random_grads(1))


def test_nothing_is_added_after_a_step_or_a_load() -> None:
    _, one, two = halves()
    optimizer = ds_optim.Lion(ds_optim.param_groups(one))
    take_steps(one, optimizer, random_grads(1))
    loaded = ds_optim.Lion(ds_optim.param_groups(one))
    loaded.load_state_dict(optimizer.state_dict())
    for built in (optimizer, loaded, copy.deepcopy(optimizer)):
        with pytest.raises(UserError, match="cannot be added once an engine has the optimizer, or it was stepped"):
            built.add_param_group(ds_optim.param_groups(two)[0])
