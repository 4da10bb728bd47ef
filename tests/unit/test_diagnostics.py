"""``diagnostics: true``: every number against one worked out by hand, and no bit of a weight changed for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.diagnostics import Diagnostics
from tests.cases import CASES, SMALL
from tests.reference import Array
from tests.stepping import MATRICES, Grads, SmallModel, build, random_grads, take_steps, trained, weights_of

FP32: dict[str, Any] = {"polar": {"dtype": "float32"}}
GROUPS = {"matrix": MATRICES, "aux": ("row", "dot", "embed.weight"), "vector": ("tall.bias", "gain")}
SPECTRAL = {case.type for case in CASES.values() if case.has_matrices}
FAMILY: list[tuple[str, dict[str, Any]]] = [
    *((name, {**(FP32 if name in SPECTRAL else {}), **hyper}) for name, hyper in SMALL if hyper.get("period") != "inf"),
    ("Muon", {**FP32, "aux": "adamw"}),
]


def diagnosed(name: str, grads: list[Grads], size: float = 1.0, **hyper: Any) -> dict[str, float]:
    """What the last of the steps was found to have done."""
    model = SmallModel(size)
    optimizer = build(name, model, diagnostics=True, **hyper)
    take_steps(model, optimizer, grads)
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer.diagnostics


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_group(number: Callable[[str], float], join: Callable[[list[float]], float] = mean) -> dict[str, float]:
    """A number of each parameter, joined within each group."""
    return {group: join([number(name) for name in names]) for group, names in GROUPS.items()}


def found(diagnostics: dict[str, float], what: str) -> dict[str, float]:
    """Of every group that has it."""
    return {key.split("/", 1)[0]: value for key, value in diagnostics.items() if key.split("/", 1)[1] == what}


def full(entry: Grads, name: str) -> Array:
    return entry[name].double().numpy()


# ------------------------------------------------------------------------------------------- of every rule


def with_zeros(entry: Grads) -> Grads:
    """Every third element of a gradient is 0."""
    entry = {name: g.clone() for name, g in entry.items()}
    for g in entry.values():
        g.view(-1)[::3] = 0
    return entry


def test_lions_updates_by_hand() -> None:
    """theta moves by -lr (wd theta + sign c): an update of 0 where c is, its norm over that of theta before."""
    entry, lr, decay = with_zeros(random_grads(1)[0]), 0.5, 0.25
    diagnostics = diagnosed("Lion", [entry], lr=lr, weight_decay=decay)
    start = weights_of(SmallModel())
    for group, names in GROUPS.items():
        theta = np.concatenate([start[name].ravel() for name in names])
        sign = np.concatenate([np.sign(full(entry, name)).ravel() for name in names])
        change = lr * (sign + (0 if group == "vector" else decay) * theta)
        assert diagnostics[f"{group}/zero updates"] == np.mean(sign == 0)
        ratio = np.linalg.norm(change) / np.linalg.norm(theta)
        # Weights of about 1 that move by about .5: fp32 leaves 1e-7 of each, less of their norm.
        assert diagnostics[f"{group}/update rms / weight rms"] == pytest.approx(ratio, rel=2e-7)
    assert set(diagnostics) == {f"{g}/{what}" for g in GROUPS for what in ("zero updates", "update rms / weight rms")}


@pytest.mark.parametrize(("name", "hyper"), FAMILY)
def test_update_over_weight_is_that_of_the_weights_themselves(name: str, hyper: dict[str, Any]) -> None:
    """Of the last of three steps, from the weights before it and after it, whose difference fp32 may round."""
    grads, hyper = random_grads(3), {"lr": 0.01, **hyper}
    before, after = trained(name, grads[:2], **hyper), trained(name, grads, **hyper)
    diagnostics = diagnosed(name, grads, **hyper)
    for group, names in GROUPS.items():
        change = np.concatenate([(after[n] - before[n]).ravel() for n in names])
        theta = np.concatenate([before[n].ravel() for n in names])
        ratio = np.linalg.norm(change) / np.linalg.norm(theta)
        assert diagnostics[f"{group}/update rms / weight rms"] == pytest.approx(ratio, rel=6e-8), group


@pytest.mark.parametrize(("name", "hyper"), FAMILY)
def test_what_only_decays_is_a_zero_update(name: str, hyper: dict[str, Any]) -> None:
    """With gradients of 0 all updates are; with others but a few."""
    zeros = [{key: torch.zeros_like(g) for key, g in random_grads(1)[0].items()}]
    hyper = {"lr": 0.01, "weight_decay": 0.0 if name == "Lamb" else 0.5, **hyper}
    assert set(found(diagnosed(name, zeros, **hyper), "zero updates").values()) == {1.0}
    assert max(found(diagnosed(name, random_grads(2), **hyper), "zero updates").values()) < 0.5


def test_weights_of_0_have_no_ratio() -> None:
    diagnostics = diagnosed("Lion", random_grads(1), size=0.0)
    assert set(found(diagnostics, "update rms / weight rms").values()) == {math.inf}


# ------------------------------------------------------------------------------------- what a rule has to say


def test_saturated_trust_ratios_by_hand() -> None:
    (entry,), start, tau = random_grads(1), weights_of(SmallModel()), 0.95
    ratios = {name: float(np.linalg.norm(start[name]) / np.linalg.norm(full(entry, name))) for name in start}
    diagnostics = diagnosed("StableLion", [entry], trust_ratio_max=tau)
    assert found(diagnostics, "saturated trust ratios") == by_group(lambda name: float(ratios[name] >= tau))
    assert 0 < diagnostics["matrix/saturated trust ratios"] < 1
    expected = by_group(lambda name: min(ratios[name], tau))
    assert found(diagnostics, "mean trust ratio") == pytest.approx(expected, rel=1e-6)


def test_min_sigma_by_hand() -> None:
    """Of the second step: v = b2 (1-b2) mean g1^2 + (1-b2) mean (g2 - m1)^2, m1 = (1-b1) g1 sigma1."""
    first, second = random_grads(2)
    b1, b2 = 0.8, 0.7

    def sigma(name: str) -> float:
        g1, g2 = full(first, name), full(second, name)
        v1 = (1 - b2) * np.mean(g1**2)
        m1 = (1 - b1) * g1 / (1 + math.sqrt(v1))
        return float(1 / (1 + math.sqrt(b2 * v1 + (1 - b2) * np.mean((g2 - m1) ** 2))))

    diagnostics = diagnosed("LASM", [first, second], betas=(b1, b2))
    assert found(diagnostics, "min sigma") == pytest.approx(by_group(sigma, min), rel=1e-6)


def test_open_gates_of_clion_by_hand() -> None:
    """gate "tensor": the share of parameters; "coordinate": of elements, averaged over parameters."""
    (entry,), nu = random_grads(1), 0.005

    def size(name: str) -> Array:
        return np.abs(0.1 * full(entry, name))  # c, at momentum 0

    tensors = diagnosed("CLion", [entry], nu=nu, gate="tensor", betas=(0.9, 0.99))
    assert found(tensors, "open gates") == by_group(lambda name: float(size(name).min() >= nu))
    assert 0 < tensors["matrix/open gates"] < 1
    elements = diagnosed("CLion", [entry], nu=nu, betas=(0.9, 0.99))
    expected = by_group(lambda name: float(np.mean(size(name) >= nu)))
    assert found(elements, "open gates") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gate", ["frobenius", "singular_gap"])
def test_open_gates_of_mimuon_by_hand(gate: str) -> None:
    """Of matrices; the aux rule has none to open."""
    (entry,), beta, tau = random_grads(1), 0.5, 4.0 if gate == "frobenius" else 0.1

    def is_open(name: str) -> float:
        m = beta * full(entry, name).reshape(entry[name].shape[0], -1)
        if gate == "frobenius":
            return float(np.linalg.norm(m) >= tau)
        return float(np.min(-np.diff(np.linalg.svd(m, compute_uv=False)), initial=np.inf) >= tau)

    diagnostics = diagnosed("MiMuon", [entry], beta=beta, tau=tau, gate=gate, **FP32)
    expected = mean([is_open(name) for name in MATRICES])
    assert found(diagnostics, "open gates") == {"matrix": expected}
    assert 0 < expected < 1


def test_a_matrix_without_gradient_has_no_gate() -> None:
    (entry,) = random_grads(1)
    del entry["square.weight"]
    everything, nothing = (diagnosed("MiMuon", [entry], tau=tau, **FP32) for tau in (0.0, 1e9))
    assert everything["matrix/open gates"] == 1
    assert nothing["matrix/open gates"] == 0
    some = diagnosed("MiMuon", [entry], beta=0.5, tau=4.0, **FP32)
    large = [float(np.linalg.norm(0.5 * full(entry, name)) >= 4.0) for name in MATRICES if name in entry]
    assert some["matrix/open gates"] == mean(large)


def test_agreeing_gradients_and_slowed_parameters_by_hand() -> None:
    first, second = random_grads(2)

    def agreeing(name: str) -> float:
        g1, g2 = full(first, name), full(second, name)
        return float(np.mean((0.95 * 0.02 * g1 + 0.05 * g2) * g2 > 0))

    diagnostics = diagnosed("CautiousLion", [first, second])
    assert found(diagnostics, "agreeing gradients") == pytest.approx(by_group(agreeing), rel=1e-12)

    def rms(name: str) -> float:
        """v_hat weighs both squares almost alike: (b2 g1^2 + g2^2) / (1 + b2)."""
        g1, g2 = full(first, name) ** 2, full(second, name) ** 2
        return float(np.sqrt(np.mean(g2 / ((0.95 * g1 + g2) / 1.95))))

    diagnostics = diagnosed("StableAdamW", [first, second])
    assert found(diagnostics, "mean rms") == pytest.approx(by_group(rms), rel=1e-6)
    assert found(diagnostics, "slowed parameters") == by_group(lambda name: float(rms(name) > 1))


# --------------------------------------------------------------------------------------------- what they cost


@pytest.mark.parametrize(("name", "hyper"), FAMILY)
def test_diagnostics_change_no_bit(name: str, hyper: dict[str, Any]) -> None:
    grads = random_grads(4)
    plain, watched = trained(name, grads, **hyper), trained(name, grads, diagnostics=True, **hyper)
    assert [key for key in plain if (plain[key] != watched[key]).any()] == []


@pytest.mark.parametrize(("name", "hyper"), FAMILY)
def test_without_diagnostics_nothing_is_copied_counted_or_logged(
    name: str, hyper: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("diagnostics are off")

    for method in ("before", "after", "log", "__init__"):
        monkeypatch.setattr(Diagnostics, method, fail)
    monkeypatch.setattr("ds_optim.optimizers.clion.count_from", fail)
    model = SmallModel()
    optimizer = build(name, model, **hyper)
    with caplog.at_level(logging.INFO, "ds_optim.diagnostics"):
        take_steps(model, optimizer, random_grads(2))
    assert isinstance(optimizer, ZeroOptimizer)
    assert optimizer.diagnostics == {}
    assert caplog.records == []


@pytest.mark.parametrize("name", ["Lion", "LionMuon", "LASM"])
def test_one_line_is_logged_at_every_step(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ds_optim.diagnostics"):
        diagnostics = diagnosed(name, random_grads(3))
    lines = [record.getMessage() for record in caplog.records if record.name == "ds_optim.diagnostics"]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2", "step 3"]
    assert all("\n" not in line for line in lines)
    for key, value in diagnostics.items():
        assert f"{key} {value:.4g}" in lines[-1]


def test_a_step_that_leaves_a_group_out_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """The last group has no gradient at the second step: that step is logged, and the group does not count in it."""
    grads = random_grads(2)
    for name in GROUPS["vector"]:
        del grads[1][name]
    with caplog.at_level(logging.INFO, "ds_optim.diagnostics"):
        diagnostics = diagnosed("Lion", grads)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 1", "step 2"]
    assert set(found(diagnostics, "zero updates")) == {"matrix", "aux"}


def test_a_skipped_step_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    grads = random_grads(2)
    grads[1]["gain"][0] = math.nan
    with caplog.at_level(logging.INFO, "ds_optim.diagnostics"):
        assert diagnosed("Lion", grads) == diagnosed("Lion", grads[:1])
    assert len(caplog.records) == 2
