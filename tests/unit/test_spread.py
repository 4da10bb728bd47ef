"""LionMuon's ``spread``: of P steps each orthogonalizes about a P-th of the matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.optimizers.saved import SAVED
from tests.stepping import MATRICES, SmallModel, build, random_grads, referred, take_steps, trained, weights_of

RATES: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5, "sign_lr_ratio": 8}
# By hand: work is 612 (wide), 512 (square), 325 (tall), 192 (conv), the dearest first to the turn with the least.
PHASES = {
    2: {"wide.weight": 0, "conv.weight": 0, "square.weight": 1, "tall.weight": 1},
    3: {"wide.weight": 0, "square.weight": 1, "tall.weight": 2, "conv.weight": 2},
    5: {"wide.weight": 0, "square.weight": 1, "tall.weight": 2, "conv.weight": 3},
}


def phases_of(optimizer: Any) -> dict[str, int]:
    return {
        member.spec.name: group["phase"]
        for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
        if group["role"] == "matrix"
        for member in members
    }


@pytest.mark.parametrize(("name", "period"), [("LionMuon", 2), ("LionMuon", 3), ("LionMuon", 5), ("SignMuon", 3)])
def test_matrices_take_turns_as_the_reference_does(name: str, period: int) -> None:
    grads = random_grads(12)
    given = {**RATES, "period": period}
    ours = trained(name, grads, 0.001, spread=True, polar={"dtype": "float32", "method": "standard"}, **given)
    theirs = referred(name, grads, 0.001, polar={"dtype": np.float32}, phases=PHASES[period], **given)
    start = weights_of(SmallModel(0.001))
    for parameter, expected in theirs.items():
        error = np.linalg.norm(ours[parameter] - expected) / np.linalg.norm(expected - start[parameter])
        assert error < (1e-3 if parameter in MATRICES else 1e-6), parameter


def test_each_step_orthogonalizes_the_matrices_whose_turn_it_is() -> None:
    """A sign step moves all elements by the same; an orthogonalized one does not."""
    model = SmallModel(0.0)
    polar = {"dtype": "float32"}
    optimizer = build(
        "LionMuon", model, lr=2.0**-6, weight_decay=0.0, sign_lr_ratio=8, period=3, spread=True, polar=polar
    )
    assert phases_of(optimizer) == PHASES[3]
    for step, entry in enumerate(random_grads(9)):
        before = weights_of(model)
        take_steps(model, optimizer, [entry])
        sizes = {name: np.abs(weights_of(model)[name] - before[name]) for name in MATRICES}
        assert {name for name, size in sizes.items() if np.ptp(size) > 1e-6} == {
            name for name, phase in PHASES[3].items() if phase == step % 3
        }


def test_work_is_dealt_out_evenly_and_alike_matrices_stay_neighbours() -> None:
    model = nn.ModuleList([nn.Linear(16, width, bias=False) for width in [16] * 12 + [32] * 6])
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), period=3, spread=True)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["matrix", "matrix 2", "matrix 3"]
    for members in optimizer.members:
        shapes = [member.spec.shape for member in members]
        assert shapes == [(16, 16)] * 4 + [(32, 16)] * 2


def test_nothing_is_cut_where_there_are_no_turns() -> None:
    for period, spread in ((1, True), ("inf", True), (2, False)):
        optimizer: Any = build("LionMuon", SmallModel(), period=period, spread=spread)
        assert [group["name"] for group in optimizer.param_groups] == ["matrix", "aux", "vector"]
        assert set(phases_of(optimizer).values()) == {0}


def test_a_group_may_have_a_period_or_a_phase_of_its_own() -> None:
    model = SmallModel()
    (matrix, *rest) = ds_optim.param_groups(model)
    members = {member.spec.name: member for member in matrix[MEMBERS]}
    first = {**matrix, "params": [members["wide.weight"].parameter], "name": "late", "phase": 3}
    second = {**matrix, "params": [members[name].parameter for name in MATRICES[::2]], "name": "often", "period": 2}
    third = {**matrix, "params": [members["conv.weight"].parameter], "name": "rest"}
    optimizer: Any = ds_optim.LionMuon([first, second, third, *rest], period=5, spread=True)
    assert phases_of(optimizer) == {"wide.weight": 3, "square.weight": 0, "tall.weight": 1, "conv.weight": 0}
    assert [group["period"] for group in optimizer.param_groups[:4]] == [5, 2, 2, 5]


def test_a_group_that_is_added_is_cut_too() -> None:
    model = SmallModel()
    matrix, *rest = ds_optim.param_groups(model)
    optimizer: Any = ds_optim.LionMuon(rest, period=2, spread=True)
    optimizer.add_param_group(matrix)
    assert phases_of(optimizer) == PHASES[2]
    take_steps(model, optimizer, random_grads(2))
    whole = trained("LionMuon", random_grads(2), period=2, spread=True)
    assert all((weights_of(model)[name] == whole[name]).all() for name in whole)


def test_a_run_saved_before_there_were_phases_goes_on() -> None:
    model, grads = SmallModel(), random_grads(4)
    optimizer = build("LionMuon", model)
    take_steps(model, optimizer, grads[:1])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("phase", None)
        for described in group.get(SAVED, {}).get("groups", ()):
            described.pop("phase", None)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = SmallModel()
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(weights[name])
    fresh = build("LionMuon", again)
    fresh.load_state_dict(saved)
    take_steps(again, fresh, grads[1:])
    assert all((weights_of(again)[n] == w).all() for n, w in trained("LionMuon", grads).items())


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("LionMuon", {"spread": "yes"}, "spread is 'yes': write true or false"),
        ("LionMuon", {"spread": True, "period_mode": "random"}, 'spread is for period_mode "fixed"'),
        ("Muon", {"spread": True}, "no parameter 'spread'"),
    ],
)
def test_what_cannot_be_is_said(name: str, hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(name, SmallModel(), **hyper)
