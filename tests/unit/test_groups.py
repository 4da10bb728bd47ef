"""A group's hyperparameters are what it steps with, whoever sets them; users' own groups; what is said of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.optimizers.rules import RULES
from tests.stepping import SmallModel, build, random_grads, take_steps, weights_of

ONES = {name: torch.ones(p.shape) for name, p in SmallModel().named_parameters()}


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How far one step under gradients of 1 moves the weights of each parameter, without decay."""
    before = weights_of(model)
    take_steps(model, optimizer, [ONES])
    return {name: float(np.abs(before[name] - now).max()) for name, now in weights_of(model).items()}


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in optimizer.param_groups}


# ------------------------------------------------------------------------------- before and after construction


def test_what_stands_in_a_group_wins_over_the_constructor() -> None:
    model = SmallModel()
    groups = ds_optim.param_groups(model)
    for group in groups:
        if group["name"] == "aux":
            group.update(lr=1e-5, weight_decay=0.0)
        if group["name"] == "vector":
            group.update(betas=[0.5, 0.75], weight_decay=0.25)
    optimizer = ds_optim.Lion(groups, lr=1e-2, weight_decay=0.1)
    own = groups_of(optimizer)
    assert [(own[n]["lr"], own[n]["weight_decay"]) for n in own] == [(1e-2, 0.1), (1e-5, 0.0), (1e-2, 0.25)]
    assert [own[n]["betas"] for n in own] == [(0.9, 0.99), (0.9, 0.99), (0.5, 0.75)]
    assert moved(model, optimizer)["embed.weight"] == pytest.approx(1e-5, rel=1e-2)
    momentum = {n: float(optimizer.state[p]["exp_avg"].flatten()[0]) for n, p in model.named_parameters()}
    assert (momentum["gain"], momentum["embed.weight"]) == (0.25, pytest.approx(0.01))


def test_what_somebody_writes_later_is_stepped_with() -> None:
    """A user's hand, with numbers of any kind, and a rate that falls to the sign steps too."""
    model = SmallModel()
    optimizer = build("LionMuon", model, lr=1e-2, aux_lr=1e-4, weight_decay=0.0, period="inf")
    own = groups_of(optimizer)
    own["aux"]["lr"] = 5e-5
    own["vector"].update(lr=torch.tensor(2e-5), betas=(torch.tensor(0.5), np.float64(0.5)), weight_decay=np.float32(0))
    own["matrix"]["lr"] = np.float64(2e-2)
    far = moved(model, optimizer)
    assert far["embed.weight"] == pytest.approx(5e-5, rel=1e-2)
    assert far["gain"] == pytest.approx(2e-5, rel=1e-2)
    assert far["square.weight"] == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_hyperparameter_of_every_rule_may_stand_in_a_group(name: str) -> None:
    """Written into the groups they step as they do when written to the constructor; nonsense is refused there too."""
    plain = build(name, SmallModel(), **({"layer_scales": {"square": 2.0}} if name == "LASM" else {}))
    model = SmallModel()
    groups = ds_optim.param_groups(model)
    for group, like in zip(groups, plain.param_groups, strict=True):
        hyper = {key: like[key] for key in ("lr", "weight_decay", *RULES[like["rule"]].hyper)}
        group.update(hyper)
    other = OPTIMIZERS[name](groups, lr=0.5, weight_decay=0.25)  # type: ignore[call-arg]
    for group, like in zip(other.param_groups, plain.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in like.items() if k != "params"}
    for key in ("lr", "weight_decay", *RULES[other.param_groups[0]["rule"]].hyper):
        bad = ds_optim.param_groups(model)
        bad[0][key] = "nonsense"
        with pytest.raises(UserError, match=f"parameter group 'matrix': {key}"):
            OPTIMIZERS[name](bad)


def test_an_unknown_key_gets_a_line() -> None:
    groups = ds_optim.param_groups(SmallModel())
    groups[0]["momentun"] = 0.9
    with pytest.raises(UserError, match=r"group 'matrix' has no parameter 'momentun' \(did you mean 'momentum'"):
        ds_optim.Muon(groups)
    del groups[0]["momentun"]
    groups[1]["beta"] = 0.9
    with pytest.raises(UserError, match=r"parameter group 'aux' has no parameter 'beta' \(did you mean 'betas'"):
        ds_optim.Muon(groups)


# ----------------------------------------------------------------------------------------------------- own groups


def one_by_one(groups: list[dict[str, Any]], *, keep: bool) -> list[dict[str, Any]]:
    """A group for each parameter, with a rate of its own."""
    return [
        {**(group if keep else {}), "params": [p], "lr": 1e-3 * (n + 1)}
        for group in groups
        for n, p in enumerate(group["params"])
    ]


@pytest.mark.parametrize("keep", [True, False], ids=["with the rest of the dict", "of parameters alone"])
@pytest.mark.parametrize("name", ["LionMuon", "Muon", "SpectralLion", "Lion", "StableLion"])
def test_groups_may_be_split(name: str, keep: bool) -> None:
    """Members follow their parameters: the same steps as with the rates that the parts have."""
    model = SmallModel()
    optimizer = OPTIMIZERS[name](one_by_one(ds_optim.param_groups(model), keep=keep))
    names = [group["name"] for group in optimizer.param_groups]
    assert names[:3] == ["matrix", "matrix 2", "matrix 3"]
    assert len(set(names)) == len(names) == 9
    for group, members in zip(optimizer.param_groups, optimizer.members, strict=True):
        assert [id(m.parameter) for m in members] == [id(p) for p in group["params"]]
    take_steps(model, optimizer, random_grads(3))
    for number in range(3):
        whole = SmallModel()
        groups = [{**group, "lr": 1e-3 * (number + 1)} for group in ds_optim.param_groups(whole)]
        take_steps(whole, OPTIMIZERS[name](groups), random_grads(3))
        for group in optimizer.param_groups:
            if group["lr"] == 1e-3 * (number + 1):
                own = next(n for n, p in model.named_parameters() if p is group["params"][0])
                assert torch.equal(dict(whole.named_parameters())[own], group["params"][0]), own


def test_plain_groups_for_rules_without_aux() -> None:
    model = SmallModel()
    named = dict(model.named_parameters())
    first = {"params": [named["square.weight"], named["tall.weight"]], "lr": 0.5, "name": "mine"}
    rest = [p for n, p in named.items() if n not in ("square.weight", "tall.weight")]
    vectors, others = [p for p in rest if p.dim() < 2], [p for p in rest if p.dim() >= 2]
    optimizer = ds_optim.Lion([first, {"params": others}, {"params": vectors}], lr=0.25, weight_decay=0.0)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("mine", 0.5), ("aux", 0.25), ("vector", 0.25)]
    far = moved(model, optimizer)
    assert [far[n] for n in ("square.weight", "gain", "embed.weight")] == pytest.approx([0.5, 0.25, 0.25])
    with_names = [{"params": list(model.named_parameters())}]
    assert [m.spec.name for m in ds_optim.StableLion(with_names).members[0]] == list(named)


def test_groups_that_cannot_be_stepped_get_a_line() -> None:
    model = SmallModel()
    matrix, aux, _ = ds_optim.param_groups(model)
    mixed = {"params": [*matrix["params"], *aux["params"]]}
    for groups, text in (
        ([mixed], "holds matrices and others"),
        ([{**matrix, "params": []}], "no trainable parameter"),
        ([{**matrix, "name": 3}], "write a string"),
        ([{**matrix, "params": set(matrix["params"])}], "no list of parameters"),
        ([{**matrix, "params": 3}], "no list of parameters"),
        ([{**matrix, "role": "matrx"}], "did you mean 'matrix'"),
        ([{**aux, "role": "matrix"}], "write a view"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))]}], r"param_groups\(model\)"),
    ):
        with pytest.raises(UserError, match=text):
            ds_optim.LionMuon(groups)
    with pytest.raises(UserError, match=r"param_groups\(model\)"):
        ds_optim.StoSignSGD([{"params": [nn.Parameter(torch.ones(2, 2))]}])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ds_optim.LionMuon(SmallModel()), "got a model"),
        (lambda: ds_optim.Lion(SmallModel()), "got a model"),
        (lambda: ds_optim.Lion(SmallModel().state_dict()), "got a OrderedDict"),
        (lambda: ds_optim.Lion(SmallModel().square.weight), "got a Parameter"),
        (lambda: ds_optim.param_groups(SmallModel(), views={}), "write a list of views"),  # type: ignore[arg-type]
        (lambda: ds_optim.param_groups(SmallModel(), views={"match": "a"}), "write a list of views"),  # type: ignore[arg-type]
        (lambda: ds_optim.param_groups(SmallModel(), views=["square"]), "is no object"),  # type: ignore[list-item]
        (lambda: ds_optim.param_groups(SmallModel(), matrix_exclude={}), "write a list of patterns"),  # type: ignore[arg-type]
        (lambda: ds_optim.param_groups(SmallModel(), matrix_exclude=[3]), "no regular expression"),  # type: ignore[list-item]
        (lambda: ds_optim.param_groups(list(SmallModel().parameters())), "pass the model itself"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_list_of_groups_gets_one_line(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(UserError, match=text) as problem:
        make()
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("Muon", "beta", "'momentum'"),
        ("Muon", "betas", "'momentum'"),
        ("SignMuon", "momentum", "'beta'"),
        ("SignMuon", "betas", "'beta'"),
        ("Lion", "momentum", "'betas'"),
        ("Lion", "beta1", "'betas'"),
        ("LionMuon", "adamw_lr", "'aux_lr'"),
        ("Muon", "use_nesterov", "'nesterov'"),
        ("Muon", "ns_steps", "polar"),
        ("Muon", "eps", "fixed"),
        ("Lion", "wd", "'weight_decay'"),
        ("Lion", "learning_rate", "'lr'"),
        ("Lion", "momentum_dtpye", "'momentum_dtype'"),
    ],
)
def test_a_peers_name_for_it_gets_ours(name: str, key: str, meant: str) -> None:
    with pytest.raises(UserError) as problem:
        build(name, SmallModel(), **{key: 0.9})
    assert meant in str(problem.value)


def with_experts(model: nn.Module, *names: str, ranks: str = "ep_size_2") -> nn.Module:
    for name in names:
        parameter = model.get_parameter(name)
        parameter.allreduce, parameter.group_name = False, ranks  # type: ignore[attr-defined]
    return model


def test_experts_have_groups_of_their_own() -> None:
    """As DeepSpeed asks for them: its name of their ranks, and "moe"; one for each role, behind the others."""
    model = with_experts(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)), "1.weight", "1.bias")
    with_experts(model, "0.weight", ranks="ep_size_1")
    for groups in (ds_optim.param_groups(model), ds_optim.Lion(model.named_parameters()).param_groups):
        found = [(g["name"], g["role"], g.get("moe"), len(g["params"])) for g in groups]
        matrix = "matrix" if groups[0]["role"] == "matrix" else "aux"
        assert found == [
            (matrix, matrix, None, 1),
            ("vector", "vector", None, 2),
            ("ep_size_1", matrix, True, 1),
            ("ep_size_2", matrix, True, 1),
            ("ep_size_2", "vector", True, 1),
        ]
    saved = ds_optim.Muon(ds_optim.param_groups(model)).state_dict()["param_groups"]
    assert [group["moe"] for group in saved if "moe" in group] == [True] * 3


def test_experts_beside_others_in_a_group_are_refused() -> None:
    model = with_experts(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), "1.weight")
    groups = ds_optim.param_groups(model)
    mixed = [{**groups[0], "params": groups[0]["params"] + groups[2]["params"]}, groups[1]]
    with pytest.raises(UserError, match="'matrix' holds experts of a DeepSpeed MoE layer beside other parameters"):
        ds_optim.Muon(mixed)
    named = [{"params": [model.get_parameter("1.weight")], "name": "mine"}, {"params": [*model[0].parameters()]}]
    assert [g["name"] for g in ds_optim.Lion(named).param_groups][:1] == ["ep_size_2"]
