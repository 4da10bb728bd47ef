"""What the rules of the family refuse: one line, with the key as the user wrote it and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.optimizers.checks import (
    Check,
    check_at_least_zero,
    check_beta,
    check_betas,
    check_bool,
    check_fraction,
    check_new_weight,
    check_period,
    check_positive,
    check_seed,
    check_whole,
)
from tests.cases import CASES, TYPES
from tests.stepping import SmallModel, build, random_grads, take_steps, weights_of

NAN, INF = float("nan"), float("inf")
MATCHES_NOTHING = "matches no parameter of the model: correct it or leave it out"


def refused(mistake: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ds_optim.UserError) as caught:
        mistake()
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts), line


CHOICES = [
    ("CLion", "gate", "tensr", ["'tensor'"]),
    ("CLion", "gate", "frobenius", ["coordinate, tensor"]),
    ("CLion", "gate", None, ["coordinate, tensor"]),
    ("MiMuon", "gate", "frobenus", ["'frobenius'"]),
    ("MiMuon", "gate", "tensor", ["frobenius, singular_gap"]),
    ("MiMuon", "scale", "unit_rsm", ["'unit_rms'"]),
    ("SpectralLion", "basis", "weights", ["'weight'"]),
    ("SpectralLion", "basis", "gradients", ["'gradient'"]),
    ("SpectralLion", "basis", None, ["gradient, momentum, weight"]),
    ("SpectralLion", "basis", "svd", ["momentum, weight"]),
    ("SpectralLion", "basis", 1, ["momentum, weight"]),
    ("LASM", "variance", "elements", ["'element'"]),
    ("LASM", "variance", True, ["element, tensor"]),
    ("StoSignSGD", "bound", "Tensor ", ["'tensor'"]),
    ("StoSignSGD", "bound", 0, ["element, tensor"]),
    ("LionMuon", "period_mode", "randm", ["'random'"]),
    ("SignMuon", "period_mode", "never", ["fixed, random"]),
]
# By the check of a value: values that are no good, and what the line says of them.
BAD: dict[Check, list[tuple[tuple[Any, ...], str]]] = {
    check_at_least_zero: [((-1e-9, NAN, INF, -INF), "not negative"), (("fast", True, None), "write a number")],
    check_positive: [((0, -3.0, NAN, INF), "above 0"), ((None, True, [3]), "write a number")],
    check_beta: [((1, -0.1, 1.5, NAN), "[0, 1)"), ((True, "0.9", None), "write a number")],
    check_betas: [(((0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,), 0.9, "ab"), "[0, 1)")],
    check_new_weight: [((0, -0.05, 1.01, NAN), "weight of the new gradient"), ((True, "0.05"), "write a number")],
    check_fraction: [((0, -0.5, 1.5, NAN), "above 0 and at most 1"), ((True, "half"), "write a number")],
    check_period: [((0, -2, 1.5, True, "never"), "a whole number from 1")],
    check_seed: [((-1, 1.0, 0.5, True, "0", None, 2**32), "whole number from 0 to 4294967295")],
    check_whole: [((-1, 1.0, True, "0", None), "whole number from 0")],
    check_bool: [((1, 0.0, "true", None), "true or false")],
}
OF_ALL: dict[str, Check] = {"lr": check_at_least_zero, "weight_decay": check_at_least_zero, "seed": check_seed}
OF_CLASSES: dict[tuple[str, str], Check] = {
    ("MiMuon", "raw_lr"): check_at_least_zero,
    ("SignMuon", "beta"): check_beta,
}
"""Arguments that a class makes something else of for its rule."""


def checked() -> Iterator[tuple[str, str, Check]]:
    """Every argument of every optimizer whose check is a number's or a flag's."""
    for name in TYPES:
        arguments = inspect.signature(getattr(ds_optim, name)).parameters
        checks = dict(OF_ALL)
        for case in CASES.values():
            checks |= case.rule.hyper if case.type == name else {}
        checks |= {key: check for (owner, key), check in OF_CLASSES.items() if owner == name}
        yield from ((name, key, check) for key, check in checks.items() if key in arguments and check in BAD)


SCALES: list[tuple[Any, list[str]]] = [
    *((value, ['{"attn": 1.5}']) for value in ("attn", 1.5, ["attn"], [("attn",)], [("attn", 1.0, 2.0)], [1.5])),
    ({"(": 1.5}, ["'('", "regular expression"]),
    ([("*", 1.5)], ["'*'", "regular expression"]),
    ({5: 1.5}, ["5", "regular expression"]),
    *(({"tall": value}, ["layer_scales['tall']", "above 0"]) for value in (0, 0.0, -1.5, NAN, INF)),
    *(({"tall": value}, ["layer_scales['tall']", "write a number"]) for value in ("1.5", None, True)),
    ({"no_such_layer": 1.5}, ["'no_such_layer'", MATCHES_NOTHING]),
    ({"tall": 1.5, r"attn\.": 2.0}, [repr(r"attn\."), MATCHES_NOTHING]),
]
UNKNOWN = [
    ("CLion", "nuu", "'nu'"),
    ("CLion", "gates", "'gate'"),
    ("CautiousLion", "beta", "'betas'"),
    ("StableLion", "trust_ratio", "'trust_ratio_max'"),
    ("StableLion", "layer_scale", "'layer_scales'"),
    ("LASM", "varience", "'variance'"),
    ("StoSignSGD", "bounds", "'bound'"),
    ("StoSignSGD", "seeds", "'seed'"),
    ("MiMuon", "rawlr", "'raw_lr'"),
    ("SpectralLion", "bases", "'basis'"),
    ("LionMuon", "periodmode", "'period_mode'"),
    ("Lamb", "epsilon", "'eps'"),
    ("StableAdamW", "diagnostic", "'diagnostics'"),
    ("StableLion", "polar", "known:"),
]


def refused_value(name: str, key: str, value: Any, *parts: str) -> None:
    """The line begins with the key that the user wrote."""
    refused(lambda: build(name, SmallModel(), **{key: value}), f"{key} is ", *parts)


@pytest.mark.parametrize(("name", "key", "value", "parts"), CHOICES)
def test_a_bad_choice_is_named_with_what_to_write(name: str, key: str, value: Any, parts: list[str]) -> None:
    refused_value(name, key, value, *parts)


@pytest.mark.parametrize(("name", "key", "check"), list(checked()))
def test_a_bad_value_is_named_with_what_to_write(name: str, key: str, check: Check) -> None:
    default = inspect.signature(getattr(ds_optim, name)).parameters[key].default
    for values, words in BAD[check]:
        for value in values:
            if value is not default:
                refused_value(name, key, value, words)


@pytest.mark.parametrize("name", ["LASM", "StableLion"])
@pytest.mark.parametrize(("scales", "parts"), SCALES)
def test_bad_layer_scales_are_refused(name: str, scales: Any, parts: list[str]) -> None:
    refused(lambda: build(name, SmallModel(), layer_scales=scales), "layer_scales", *parts)


def test_a_pattern_of_layer_scales_may_fit_any_parameter() -> None:
    """Also one of another group, and behind a pattern that counts first; pairs may be lists, as JSON has them."""
    for scales in ({"tall": 2, "bias": 3}, [["tall", 2], ["tall.weight", 3]], [("gain", 2.5)], {}, []):
        for name in ("LASM", "StableLion"):
            take_steps(model := SmallModel(), build(name, model, layer_scales=scales), random_grads(1))
            assert all_finite(model)


def all_finite(model: SmallModel) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(("name", "key", "nearest"), UNKNOWN)
def test_an_unknown_key_is_answered_with_the_nearest(name: str, key: str, nearest: str) -> None:
    refused(lambda: build(name, SmallModel(), **{key: 1}), f"{name} has no parameter {key!r}", nearest)


@pytest.mark.parametrize("name", ["StoSignSGD", "LASM", "StableLion", "MiMuon", "SpectralLion"])
def test_rules_that_go_by_names_refuse_bare_parameters(name: str) -> None:
    refused(lambda: getattr(ds_optim, name)(SmallModel().parameters()), "names", "ds_optim.param_groups(model)")
    groups = [{"params": list(SmallModel().parameters())}]
    refused(lambda: getattr(ds_optim, name)(groups), "ds_optim.param_groups(model)")


@pytest.mark.parametrize("name", ["StoSignSGD", "LASM", "StableLion", "CLion", "CautiousLion", "Lamb", "StableAdamW"])
def test_named_parameters_are_names_enough(name: str) -> None:
    """As each docstring says; the weights are those of ``param_groups``."""
    one, other = SmallModel(), SmallModel()
    take_steps(one, getattr(ds_optim, name)(one.named_parameters(), lr=0.01), random_grads(2))
    take_steps(other, build(name, other, lr=0.01), random_grads(2))
    ours, theirs = weights_of(one), weights_of(other)
    assert [key for key in ours if (ours[key] != theirs[key]).any()] == []


@pytest.mark.parametrize("name", ["CLion", "CautiousLion", "Lamb", "StableAdamW"])
def test_rules_that_ask_for_no_names_take_bare_parameters(name: str) -> None:
    model = SmallModel()
    before = weights_of(model)
    take_steps(model, getattr(ds_optim, name)(model.parameters(), lr=0.01), random_grads(1))
    assert all((weights_of(model)[key] != before[key]).any() for key in before)


@pytest.mark.parametrize("name", ["SpectralLion", "MiMuon"])
@pytest.mark.parametrize("polar", ["svd", ["svd"], 5])
def test_polar_that_is_no_object_is_refused(name: str, polar: Any) -> None:
    refused(lambda: build(name, SmallModel(), polar=polar), "polar")


def test_a_raw_rate_beside_a_rate_of_0_is_refused() -> None:
    """raw_lr follows lr; of 0 nothing can follow, and a rate that is silently 0 trains nothing."""
    refused(lambda: build("MiMuon", SmallModel(), lr=0.0, raw_lr=0.1, aux_lr=0.0), "lr is 0", "raw_lr")


def test_ends_of_ranges_are_allowed() -> None:
    for name, hyper in [
        ("MiMuon", {"beta": 1, "tau": 0, "raw_lr": 0}),
        ("CLion", {"nu": 0}),
        ("StoSignSGD", {"seed": 2**32 - 1, "beta": 0}),
        ("LionMuon", {"seed": 0, "period_mode": "random", "period": 1}),
        ("StableLion", {"trust_ratio_max": 1e-9}),
    ]:
        model = SmallModel()
        take_steps(model, build(name, model, **hyper), random_grads(1))  # type: ignore[arg-type]
        assert all_finite(model), name
