"""What the rules of the family are at the ends of their hyperparameters, and what they move by, worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ds_optim
from tests.reference import Array
from tests.stepping import (
    MATRICES,
    Grads,
    SmallModel,
    build,
    constant_grads,
    random_grads,
    take_steps,
    trained,
    warmup_cosine,
    weights_of,
)

STEPS = 6
FP32 = {"dtype": "float32"}


def assert_same_bits(one: Mapping[str, Array], other: Mapping[str, Array]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if (one[name] != other[name]).any()] == []


def f32(x: float) -> np.float32:
    return np.float32(x)


# ------------------------------------------------------------------------------------------ one rule is another

AGREEING = [{name: g * (1 + step) for name, g in entry.items()} for step, entry in enumerate(random_grads(1) * STEPS)]
"""Every element's gradient keeps its sign, and so its momentum agrees with it."""

Side = tuple[str, dict[str, Any]]
RATE = {"lr": 0.01, "weight_decay": 0.3}
MATRIX = {**RATE, "aux_lr": 0.002, "polar": FP32}
# A rule and its hyperparameters, and another that it must be to the bit; where it takes others, the size of the weights
# and the gradients.
SAME: list[tuple[Side, Side] | tuple[Side, Side, float, list[Grads]]] = [
    (("LionMuon", {**RATE, "sign_lr_ratio": 8, "period": "inf"}), ("Lion", {**RATE, "lr": 0.01 / 8})),
    (
        ("LionMuon", {**MATRIX, "period": 1, "betas": (0.95, 0.95)}),
        ("Muonlight", {**MATRIX, "momentum": 0.95, "nesterov": False}),
    ),
    (
        ("SignMuon", {**RATE, "beta": 0.8, "period": 3, "sign_lr_ratio": 20}),
        ("LionMuon", {**RATE, "betas": (0.8, 0.8), "period": 3, "sign_lr_ratio": 20}),
    ),
    (("Muonlight", RATE), ("Muon", {**RATE, "scale": "match_rms_adamw"})),
    (("Lion", {**RATE, "betas": (0.8, 0.8)}), ("Signum", {**RATE, "beta": 0.8})),
    (("Signum", {**RATE, "beta": 0.0}), ("SignSGD", RATE)),
    (("CLion", {**RATE, "nu": 0}), ("Lion", RATE)),
    (("CLion", {**RATE, "nu": 0, "gate": "tensor"}), ("Lion", RATE)),
    (("CLion", {"nu": 0}), ("Lion", {}), 1.0, constant_grads(0.0, STEPS)),
    (("CautiousLion", RATE), ("Lion", {**RATE, "betas": (0.95, 0.98)}), 1.0, AGREEING),
    # Decay goes without the ratio: lr wd = (tau lr) (wd / tau), exact for powers of two.
    (
        ("StableLion", {"lr": 0.01, "trust_ratio_max": 0.0625, "weight_decay": 0.5}),
        ("Lion", {"lr": 0.01 / 16, "weight_decay": 8.0}),
    ),
    (  # c is the new m: the sign that the source writes.
        ("StableLion", {"lr": 0.01, "betas": (0.9, 0.9), "trust_ratio_max": 0.0625, "weight_decay": 0.5}),
        ("Signum", {"lr": 0.01 / 16, "beta": 0.9, "weight_decay": 8.0}),
    ),
    (
        ("StableLion", {"lr": 0.01, "trust_ratio_max": 4.0, "weight_decay": 0.5}),
        ("Lion", {"lr": 0.04, "weight_decay": 0.125}),
        1000.0,
        random_grads(STEPS),
    ),
    (
        ("MiMuon", {**MATRIX, "tau": 0, "beta": 0.05}),
        ("Muon", {**MATRIX, "momentum": 0.95, "nesterov": False, "scale": "match_rms_adamw"}),
    ),
    (
        ("LionMuon", {"period": 1, "period_mode": "random", "polar": FP32}),
        ("LionMuon", {"period": 1, "polar": FP32}),
    ),
    (
        ("LionMuon", {"period": "inf", "period_mode": "random", "lr": 0.01}),
        ("Lion", {"lr": 0.001, "weight_decay": 0.1}),
    ),
]


@pytest.mark.parametrize("case", SAME, ids=lambda case: f"{case[0][0]} {case[0][1]} is {case[1][0]}")
def test_one_rule_is_another(case: tuple[Any, ...]) -> None:
    """Bitwise, under a schedule: where the formulas are one, so are the operations."""
    (one, its_hyper), (other, other_hyper), size, grads = *case[:2], *(case[2:] or (1.0, random_grads(STEPS)))
    schedule = warmup_cosine(STEPS, warmup=2)
    ours = trained(one, grads, size, schedule, **its_hyper)
    assert_same_bits(ours, trained(other, grads, size, schedule, **other_hyper))


def test_lasm_is_signum_with_layer_scales_while_gradients_are_tiny() -> None:
    """sigma is 1 to 1e-8 at gradients of 1e-9."""
    grads = [{name: 1e-9 * g for name, g in entry.items()} for entry in random_grads(STEPS)]
    scales = {"tall": 2.0, r"^(wide|gain)": 0.25, "l": 3.0}
    ours = trained("LASM", grads, 0.0, lr=0.01, weight_decay=0.0, layer_scales=scales)
    plain = trained("Signum", grads, 0.0, lr=0.01, weight_decay=0.0)
    alphas = {"tall.weight": 2.0, "tall.bias": 2.0, "wide.weight": 0.25, "gain": 0.25}
    for name, moved in plain.items():
        np.testing.assert_allclose(ours[name], alphas.get(name, 1.0) * moved, rtol=1e-6)
    large = trained("LASM", random_grads(STEPS), 0.0, lr=0.01, weight_decay=0.0, layer_scales=scales)
    assert (
        np.sign(large["square.weight"]) != np.sign(trained("Signum", random_grads(STEPS), 0.0)["square.weight"])
    ).any()


# --------------------------------------------------------------------------------- what a step is, by hand


class Flat(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))


@pytest.mark.parametrize("gate", ["tensor", "coordinate"])
def test_clion_with_all_gates_closed_moves_by_the_direction_itself(gate: str) -> None:
    """fp32 by hand, operation by operation: c = b1 m + (1-b1) g, no sign."""
    grads, lr, decay = random_grads(3), 0.03, 0.5
    ours = trained("CLion", grads, nu=1e9, gate=gate, lr=lr, weight_decay=decay)
    for name, start in weights_of(SmallModel()).items():
        p: np.ndarray = start.astype(np.float32)
        m: np.ndarray = np.zeros(start.shape, dtype=np.float32)
        for entry in grads:
            g = entry[name].numpy()
            c = g * f32(1 - 0.9) + m * f32(0.9)
            p = (p * f32(1 - lr * decay) if p.ndim > 1 else p) - c * f32(lr)
            m = m * f32(0.99) + g * f32(1 - 0.99)
        np.testing.assert_array_equal(ours[name], p)


@pytest.mark.parametrize("gate", ["tensor", "coordinate"])
def test_clions_gate_is_open_at_the_threshold(gate: str) -> None:
    """c = g / 2 is nu, or just below it."""
    for value, moved in [(0.5, 1.0), (0.4375, 0.21875)]:
        model = Flat(3)
        model.weight.grad = torch.tensor([value, -value, 0.0])
        ds_optim.CLion(ds_optim.param_groups(model), lr=1.0, betas=(0.5, 0.5), nu=0.25, gate=gate).step()
        assert model.weight.tolist() == [-moved, moved, 0.0]


@pytest.mark.parametrize("gate", ["frobenius", "singular_gap"])
def test_mimuons_gate_is_open_at_the_threshold(gate: str) -> None:
    """Singular values 4 and 3, and so the norm 5 and the gap 1: by the polar factor there, by M just above."""
    tau = 5.0 if gate == "frobenius" else 1.0
    for threshold, moved in [(tau, 2.0), (tau * 1.001, 8.0)]:
        model = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(model.weight)
        model.weight.grad = torch.tensor([[4.0, 0.0], [0.0, 3.0]])
        hyper: dict[str, Any] = {"scale": "unit_rms", "weight_decay": 0.0, "polar": {"method": "svd"}}
        groups = ds_optim.param_groups(model)
        ds_optim.MiMuon(groups, lr=2.0, beta=1.0, gate=gate, tau=threshold, **hyper).step()
        assert model.weight.tolist() == [[-moved, 0.0], [0.0, -2.0 if moved == 2 else -6.0]]


@pytest.mark.parametrize("gate", ["frobenius", "singular_gap"])
def test_mimuon_with_all_gates_closed_is_sgd_with_momentum(gate: str) -> None:
    """At raw_lr, which a schedule of lr moves along; a single number has no gap, and so stays open."""
    grads, schedule, b, raw, decay = random_grads(4), [1.0, 0.5, 0.25, 2.0], 0.05, 0.02, 0.5
    hyper: dict[str, Any] = {"beta": b, "gate": gate, "tau": 1e9, "lr": 0.01, "raw_lr": raw, "weight_decay": decay}
    ours = trained("MiMuon", grads, 1.0, schedule, **hyper)
    for name in MATRICES:
        start = weights_of(SmallModel())[name]
        if gate == "singular_gap" and min(start.shape[0], start[0].size) == 1:
            continue
        p: np.ndarray = start.astype(np.float32)
        m: np.ndarray = np.zeros(start.shape, dtype=np.float32)
        for entry, factor in zip(grads, schedule, strict=True):
            m = entry[name].numpy() * f32(b) + m * f32(1 - b)
            p = p * f32(1 - raw * factor * decay) - m * f32(raw * factor)
        np.testing.assert_array_equal(ours[name], p)


def test_unsaturated_stable_lion_moves_by_the_ratio_of_the_norms() -> None:
    start, (entry,), lr = weights_of(SmallModel(0.7)), random_grads(1), 2.0
    after = trained("StableLion", [entry], 0.7, lr=lr, weight_decay=0.0, trust_ratio_max=1e6)
    for name, before in start.items():
        ratio = np.linalg.norm(before) / np.linalg.norm(entry[name].double().numpy())
        # The difference of two fp32 numbers of about 1, of one rounding each.
        np.testing.assert_allclose(np.abs(after[name] - before), lr * ratio, atol=2.0**-22)
        norm = np.linalg.norm(after[name] - before)
        assert norm == pytest.approx(lr * ratio * before.size**0.5, rel=1e-6), name


@pytest.mark.parametrize("size", [0.3, 5.0])
def test_lamb_moves_by_the_norm_of_the_parameter(size: float) -> None:
    """lr min(||theta||, 10), whatever the gradient: of every parameter, at the first step and the second."""
    model = SmallModel(size)
    optimizer = build("Lamb", model, lr=0.25, weight_decay=0.1)
    capped = 0
    for entry in random_grads(2):
        before = weights_of(model)
        take_steps(model, optimizer, [entry])
        for name, after in weights_of(model).items():
            norm = float(np.linalg.norm(before[name]))
            capped += norm > 10
            assert np.linalg.norm(after - before[name]) == pytest.approx(0.25 * min(norm, 10.0), rel=1e-6), name
    assert (capped > 0) == (size > 1)


@pytest.mark.parametrize(("present", "boost"), [(1, 1000), (5, 1000), (10, 500), (2500, 2), (5000, 1)])
def test_cautious_lion_boosts_a_sparse_gradient_at_most_a_thousandfold(present: int, boost: int) -> None:
    """Of 5000 elements so many have a gradient: those move by lr N / max(present, N / 1000), the others not."""
    model, lr = Flat(5000), 2.0**-8
    model.weight.grad = torch.zeros(5000)
    model.weight.grad[:present] = -1.0
    ds_optim.CautiousLion(ds_optim.param_groups(model), lr=lr).step()
    assert model.weight[:present].tolist() == [lr * boost] * present
    assert not model.weight[present:].any()
