"""What two optimizers have in common, what they keep, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.optimizers.rules import RULES
from tests.cases import CASES, Case
from tests.cases import TYPES as NAMES
from tests.stepping import MATRICES, Grads, SmallModel, build, random_grads, take_steps, trained, warmup_cosine

STEPS = 12


def test_bare_and_named_parameters_step_as_groups_do() -> None:
    """A rule without aux needs no names."""
    grads = random_grads(STEPS)
    expected = trained("Lion", grads, lr=0.01)
    for named in (False, True):
        model = SmallModel()
        parameters: Iterable[Any] = model.named_parameters() if named else model.parameters()
        take_steps(model, ds_optim.Lion(parameters, lr=0.01), grads)
        for name, p in model.named_parameters():
            assert (p.detach().double().numpy() == expected[name]).all(), name


@pytest.mark.parametrize("name", ["LionMuon", "Muonlight"])
def test_a_torch_scheduler_moves_every_group_alike(name: str) -> None:
    grads, schedule = random_grads(STEPS), warmup_cosine(STEPS)
    expected = trained(name, grads, 1.0, schedule, lr=0.01)
    model = SmallModel()
    optimizer = build(name, model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule[min(t, STEPS - 1)])
    for entry in grads:
        take_steps(model, optimizer, [entry])
        scheduler.step()
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), torch.from_numpy(expected[parameter]), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ what is kept


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the state, a storage counted once, whole."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_kept_is_what_the_rule_says(case: Case) -> None:
    model = SmallModel()
    optimizer = build(case.type, model, **case.option)
    take_steps(model, optimizer, random_grads(3))
    for group in optimizer.param_groups:
        rule = RULES[group["rule"]]
        for p in group["params"]:
            state = optimizer.state[p]
            assert set(state) == {"step", *(buffer.key for buffer in rule.buffers)}
            assert type(state["step"]) is int
            assert state["step"] == 3
            for key in rule.elements:
                assert (state[key].dtype, state[key].shape) == (torch.float32, p.shape)


def test_rules_say_of_themselves_what_the_papers_keep() -> None:
    """One fp32 value an element of the sign and matrix rules, two of Adam's kin, none of the sign alone."""
    values = {name: len(case.rule.elements) for name, case in CASES.items()}
    two = {"Lamb", "StableAdamW", "LASM-element", "StoSignSGD-element"}
    assert values == {name: 2 if name in two else 0 if name == "SignSGD" else 1 for name in CASES}


def test_aux_adamw_keeps_a_second_buffer_for_its_own_part_only() -> None:
    model = SmallModel()
    optimizer = build("LionMuon", model, aux="adamw")
    take_steps(model, optimizer, random_grads(2))
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in MATRICES)
    assert state_bytes(optimizer) == 4 * (2 * everything - matrices)


# ------------------------------------------------------------------------------------------- nothing may move


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[Any]]:
    state = [
        (key, value.clone() if isinstance(value, torch.Tensor) else value)
        for p in model.parameters()
        for key, value in sorted(optimizer.state[p].items())
    ]
    return [p.detach().clone() for p in model.parameters()], state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["square.weight", "gain"])
def test_a_gradient_that_is_not_finite_moves_nothing(name: str, bad: float, where: str) -> None:
    """Neither weights nor momentum nor the count, of no parameter, on an odd or an even step."""
    grads = random_grads(3)
    broken: Grads = {key: g.clone() for key, g in grads[0].items()}
    broken[where].view(-1)[-1] = bad
    model = SmallModel()
    optimizer = build(name, model)
    for entry in grads:
        take_steps(model, optimizer, [entry])
        weights, state = snapshot(model, optimizer)
        take_steps(model, optimizer, [broken])
        weights_after, state_after = snapshot(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_after, strict=True))
        for (key, before), (_, after) in zip(state, state_after, strict=True):
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, key


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_first_step_leaves_no_trace(name: str) -> None:
    grads = random_grads(3)
    broken = {key: torch.full_like(g, float("nan")) for key, g in grads[0].items()}
    with_bad, without = trained(name, [broken, *grads]), trained(name, grads)
    for parameter, expected in without.items():
        assert (with_bad[parameter] == expected).all(), parameter


# ------------------------------------------------------------------------------------------------ what is refused


def refused(mistake: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        mistake()
    assert isinstance(caught.value, ds_optim.UserError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hyper", "named"),
    [
        ("Muon", {"aux_lr": -1.0}, "aux_lr"),
        ("Muon", {"aux_betas": (0.9, 1.1)}, "aux_betas"),
        ("Muon", {"aux": "signum", "aux_beta": -1}, "aux_beta"),
        ("Lion", {"momentm_dtype": "float32"}, "momentum_dtype"),
        ("Lion", {"beta": (0.9, 0.99)}, "betas"),
        ("LionMuon", {"perod": 2}, "period"),
        ("Muon", {"wieght_decay": 0.1}, "weight_decay"),
        ("Muon", {"aux": "lyon"}, "lion"),
        ("Muon", {"scale": "spectrl"}, "spectral"),
        ("Muon", {"polar": {"shedule": "you"}}, "schedule"),
        ("Muon", {"polar": {"schedule": "kellr"}}, "keller"),
        ("Muon", {"exchange": {"bucket": 3}}, "bucket_mb"),
    ],
)
def test_a_mistake_in_an_argument_is_a_value_error_with_one_line(name: str, hyper: dict[str, Any], named: str) -> None:
    refused(lambda: build(name, SmallModel(), **hyper), named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"matrix_exclude": ["embed", "no_such_layer"]}, "no_such_layer"),
        ({"matrix_exclude": ["("]}, "matrix_exclude"),
        ({"matrix_exclude": "embed"}, "matrix_exclude"),
        ({"views": [{"match": "no_such_layer", "heads": 2}]}, "no_such_layer"),
        ({"views": [{"heads": 2}]}, "match"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(options: dict[str, Any], named: str) -> None:
    refused(lambda: ds_optim.param_groups(SmallModel(), **options), named)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_in_two_groups_is_refused(name: str) -> None:
    model = SmallModel()
    groups = ds_optim.param_groups(model) + ds_optim.param_groups(model)
    refused(lambda: getattr(ds_optim, name)(groups), "tall.*groups|groups.*tall")


def test_parameters_that_cannot_be_routed_are_refused() -> None:
    refused(lambda: ds_optim.LionMuon(SmallModel().parameters()), "param_groups")
    refused(lambda: ds_optim.LionMuon([{"params": list(SmallModel().parameters())}]), "param_groups")
    refused(lambda: ds_optim.Lion([]), "param_groups")
