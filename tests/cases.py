"""Every rule that is registered, with settings under which a test sees what it does: one table for all tests.

An optimizer stands here as soon as it is registered, once for each rule that an option of it chooses. It needs a line
in ``SHOWING`` where its defaults would show too little of it, and its formula in ``tests/reference.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import ds_optim
from ds_optim.optimizers.registry import DESCRIBED
from ds_optim.optimizers.rules import MEAN, RULES, Rule
from ds_optim.optimizers.updates import MatrixUpdate, Update

FP32: dict[str, Any] = {"dtype": "float32"}
"""Polar factors in fp32."""
CAUTIOUS: dict[str, Any] = {"cautious_decay": True}
"""Of all rules; never with weights in bfloat16."""

# name -> hyperparameters of a step that shows what the rule does: on the models of tests/distributed, whose gradients
# are standard normal (some gates open and some closed, trust ratios not saturated, noise of a seed of its own).
SHOWING: dict[str, dict[str, Any]] = {
    "CLion": {"nu": 0.1},
    "CLion-tensor": {"nu": 0.001},
    "StableLion": {"trust_ratio_max": 1e3},
    "StoSignSGD-element": {"seed": 5},
    "Muonlight": {"aux": "signum"},
    "SignMuon": {"period": 3},
    "Lamb": {"lr": 1e-2},
}
# The same on the model of tests/stepping.py, which is smaller.
SHOWING_SMALL: dict[str, dict[str, Any]] = {
    "CLion": {"nu": 0.3},
    "CLion-tensor": {"nu": 0.01},
    "StableLion": {"lr": 0.1},
    "Dion2": {"fraction": 0.75},
    "Lamb": {"lr": 0.1},
}
SMALL_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("Muon", {"aux_lr": 0.005, "nesterov": False, "scale": "unit_rms"}),
    ("Muonlight", {"aux_lr": 0.005, "aux": "adamw", "aux_weight_decay": 0.2}),
    ("Muonlight", {"aux_lr": 0.005, "aux": "signum", "aux_beta": 0.8, "decay_1d": True}),
    ("LionMuon", {"period": 5, "betas": (0.95, 0.98), "aux": "adamw", "aux_betas": (0.8, 0.9)}),
    ("LionMuon", {"period": "inf"}),
    ("StableLion", {"lr": 0.5, "trust_ratio_max": 0.02, "layer_scales": (("wide|gain", 2.0), ("i", 0.5))}),
    ("StoSignSGD", {"bound": "element", "seed": 7}),
    ("MiMuon", {"aux_lr": 0.005, "tau": 0.5, "raw_lr": 0.02}),
    ("MiMuon", {"aux_lr": 0.005, "gate": "singular_gap", "tau": 0.02}),
    ("Lion", CAUTIOUS),
    ("NorMuon", {"aux_lr": 0.005, **CAUTIOUS}),
    ("Dion2", {"aux_lr": 0.005, "fraction": 0.6, **CAUTIOUS}),
    ("LionMuon", {"aux": "adamw", **CAUTIOUS}),
    ("MiMuon", {"aux_lr": 0.005, "tau": 0.5, "raw_lr": 0.02, **CAUTIOUS}),
    ("SpectralLion", {"basis": "gradient", **CAUTIOUS}),
    ("LASM", CAUTIOUS),
    ("StableAdamW", CAUTIOUS),
]
# What changes a step and is no rule of its own: name -> (optimizer, hyperparameters).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon-bf16": ("Muon", {"polar": {"dtype": "bfloat16"}, "exchange": {"bucket_mb": 0.01}}),
    "Muon-aux_adamw": ("Muon", {"aux": "adamw"}),
    "NorMuon-bfloat16": ("NorMuon", {"polar": {"dtype": "bfloat16"}, "momentum_dtype": "bfloat16"}),
    "LionMuon-spread": ("LionMuon", {"spread": True, "period": 3}),
    "LionMuon-random": ("LionMuon", {"period_mode": "random", "seed": 2}),
    "Lion-bfloat16": ("Lion", {"momentum_dtype": "bfloat16"}),
    "LionMuon-bfloat16": ("LionMuon", {"momentum_dtype": "bfloat16"}),
    "StoSignSGD-bfloat16": ("StoSignSGD", {"momentum_dtype": "bfloat16"}),
    "MiMuon-some_closed": ("MiMuon", {"tau": 2.0}),
    "MiMuon-all_closed": ("MiMuon", {"tau": 1e3, "raw_lr": 0.1}),
    "MiMuon-gap": ("MiMuon", {"tau": 8e-3, "gate": "singular_gap"}),
    "SpectralLion-bf16": ("SpectralLion", {"polar": {"dtype": "bfloat16"}}),
    "SpectralLion-gradient-bfloat16": (
        "SpectralLion",
        {"basis": "gradient", "polar": {"dtype": "bfloat16"}, "momentum_dtype": "bfloat16"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An optimizer under one of its rules. option: what chooses the rule; params: that, and what shows it."""

    name: str
    type: str
    rule: Rule
    option: Mapping[str, Any]
    params: Mapping[str, Any]

    @property
    def has_matrices(self) -> bool:
        """Whether some step of it asks for whole matrices."""
        return self.rule.shape is not None


def _shipped() -> Iterator[tuple[str, str, dict[str, Any], Rule]]:
    """(name, optimizer, option, rule) of each rule of this package: "CLion", and "CLion-tensor" for gate: "tensor"."""
    for name, described in DESCRIBED.items():
        if not described.cls.__module__.startswith("ds_optim."):
            continue
        for chosen, rule in described.rules.items():
            key, _, value = chosen.partition(": ")
            option = {key: json.loads(value)} if chosen else {}
            yield "-".join([name, *map(str, option.values())]), name, option, RULES[rule]


def _case(name: str, kind: str, option: Mapping[str, Any], rule: Rule, more: Mapping[str, Any]) -> Case:
    polar = {"polar": FP32} if rule.shape is not None else {}
    return Case(name=name, type=kind, rule=rule, option=option, params={**polar, **option, **more})


def _far(case: Case) -> dict[str, float]:
    """A rate at which what is no matrix goes far, where the aux rule has a rate of its own."""
    return {"aux_lr": 0.005} if case.has_matrices and "sign_lr_ratio" not in case.rule.hyper else {}


CASES: dict[str, Case] = {
    name: _case(name, kind, option, rule, SHOWING.get(name, {})) for name, kind, option, rule in _shipped()
}
"""By name, in the order of registration."""
TYPES = list(dict.fromkeys(case.type for case in CASES.values()))
"""The optimizers' names."""
NARROW = [case.type for case in CASES.values() if case.rule.narrow and not case.option]
"""Optimizers that by default keep a momentum which may be stored in fewer bits."""

WITH_ONE_MEAN = [case.type for case in CASES.values() if case.rule.buffers == (MEAN,) and not case.option]
"""Those that by default keep a mean of gradients and nothing else."""
SMALL: list[tuple[str, dict[str, Any]]] = [
    *((case.type, {**case.option, **_far(case), **SHOWING_SMALL.get(name, {})}) for name, case in CASES.items()),
    *SMALL_VARIANTS,
]
"""(optimizer, hyperparameters) for the model of tests/stepping.py: every rule, and what changes a step of one."""


def _variant(name: str, kind: str, more: Mapping[str, Any]) -> Case:
    base = next(
        (case for case in CASES.values() if case.type == kind and case.option and case.option.items() <= more.items()),
        CASES[kind],
    )
    return _case(name, kind, base.option, base.rule, {**SHOWING.get(base.name, {}), **more})


WITH_VARIANTS: dict[str, Case] = {**CASES, **{name: _variant(name, *given) for name, given in VARIANTS.items()}}
"""The same, with options that change a step without changing its rule."""


def kind_of(case: Case) -> tuple[object, ...]:
    """What its steps are and what it keeps: rules of one kind take one way through the package."""
    steps = {type(update_of(case, step)) for step in (0, 1)}
    gated = any(isinstance(update_of(case, step), MatrixUpdate) and update_of(case, step).gate for step in (0, 1))
    return frozenset(steps), gated, case.rule.shape, [(buffer.kind, buffer.key) for buffer in case.rule.buffers]


def update_of(case: Case, step: int) -> Update:
    """What the rule answers at a step, under the case's settings."""
    optimizer = DESCRIBED[case.type].cls(ds_optim.param_groups(torch.nn.Linear(2, 2)), **case.params)  # type: ignore[call-arg]
    group = next(group for group in optimizer.param_groups if group["rule"] == case.rule.name)
    return case.rule.update({**group, "diagnostics": False}, step)


def one_of_each_kind() -> list[str]:
    """The first case of every kind."""
    found: dict[str, str] = {}
    for name, case in CASES.items():
        found.setdefault(repr(kind_of(case)), name)
    return list(found.values())
