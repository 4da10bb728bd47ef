"""Each optimizer, unsharded and in fp32, against the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests import reference
from tests.cases import SMALL as CASES
from tests.cases import TYPES
from tests.stepping import (
    MATRICES,
    SmallModel,
    build,
    constant_grads,
    random_grads,
    referred,
    take_steps,
    trained,
    warmup_cosine,
    weights_of,
)

STEPS = 50
NAMES = sorted(TYPES)
MATRIX_RULES = {name for name in NAMES if reference.RULES[name].matrix}

# The same polynomial on both sides.
FP32_POLAR: dict[str, Any] = {"polar": {"dtype": "float32", "method": "standard"}}
REFERENCE_POLAR: dict[str, Any] = {"polar": {"dtype": np.float32}}

# fp32 rounds a weight by 6e-8 of itself at each step, and no algorithm can undo that: with weights much larger
# than the way they go, this alone would pass 1e-6 of the displacement. So the rates are large enough for a weight
# to go far from where it starts (the smallest, SignMuon's in its sign steps, is a third of SMALL a step).
RATES: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}
SMALL = 0.001

# Weights to start from, of rules that leave zeros alone.
FIRST = {"MuonH": SMALL}

# A momentum in fp32 is some roundings of 6e-8 off; a sign taken of less than 16 of them is anybody's guess.
ROUNDING = 2.0**-20


class NearZero:
    """Watches a run of the reference for entries whose sign was taken of next to nothing."""

    def __init__(self) -> None:
        self.masks = {name: np.zeros(theta.shape, dtype=bool) for name, theta in weights_of(SmallModel()).items()}

    def __call__(self, name: str, step: int, state: reference.State) -> None:
        if "signed" in state:
            size = np.abs(state["signed"]).reshape(self.masks[name].shape)
            self.masks[name] |= size < ROUNDING * size.max()

    @property
    def count(self) -> int:
        return int(sum(mask.sum() for mask in self.masks.values()))


def for_package(name: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """The same polynomial in fp32 on both sides; SpectralLion is exact on both."""
    return {**hyper, **(FP32_POLAR if name in MATRIX_RULES and name != "SpectralLion" else {})}


def for_reference(name: str, hyper: dict[str, Any]) -> dict[str, Any]:
    return {**hyper, **(REFERENCE_POLAR if name in MATRIX_RULES and name != "SpectralLion" else {})}


def orthogonalized(name: str, hyper: dict[str, Any], parameter: str) -> bool:
    return name in MATRIX_RULES and parameter in MATRICES and hyper.get("period") != "inf"


def worst(error: np.ndarray, displacement: np.ndarray) -> float:
    return float(np.abs(error).max() / np.abs(displacement).max())


def normwise(error: np.ndarray, displacement: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(displacement))


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_fifty_steps_follow_the_reference(name: str, hyper: dict[str, Any]) -> None:
    grads, schedule, near_zero = random_grads(STEPS), warmup_cosine(STEPS), NearZero()
    hyper = {**RATES, **hyper}
    start = weights_of(SmallModel(SMALL))
    ours = trained(name, grads, SMALL, schedule, **for_package(name, hyper))
    theirs = referred(name, grads, SMALL, schedule, near_zero, **for_reference(name, hyper))
    assert near_zero.count <= 2
    for parameter, expected in theirs.items():
        kept = ~near_zero.masks[parameter]
        error = (ours[parameter] - expected)[kept]
        displacement = (expected - start[parameter])[kept]
        if orthogonalized(name, hyper, parameter):
            assert normwise(error, displacement) < 1e-3, parameter
        else:
            assert worst(error, displacement) < 1e-6, parameter


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_spec(name: str) -> None:
    """From weights 0, where a displacement is all there is, however small the default rates."""
    grads, scale = random_grads(4), FIRST.get(name, 0.0)
    ours = trained(name, grads, scale, **for_package(name, {}))
    theirs = referred(name, grads, scale, **for_reference(name, {}))
    start = weights_of(SmallModel(scale))
    for parameter, reached in theirs.items():
        error, expected = ours[parameter] - reached, reached - start[parameter]
        if orthogonalized(name, {}, parameter):
            assert normwise(error, expected) < 1e-3, parameter
        else:
            assert worst(error, expected) < 1e-6, parameter


@pytest.mark.parametrize("name", sorted(MATRIX_RULES - {"SpectralLion"}))
def test_newton_schulz_in_bfloat16_stays_near_the_same_polynomial(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """bf16 rounds by up to 2^-8 and the polynomial's slope at 0 is 3.4 a step, so a few per cent are expected.

    A quarter of what the polynomial itself is away from the polar factor (.15 and more, Gaussian input) is the
    bound: above it the dtype, not the schedule, would decide how orthogonal an update is.
    """
    grads, schedule = random_grads(STEPS), warmup_cosine(STEPS)
    start = weights_of(SmallModel(SMALL))
    ours = trained(name, grads, SMALL, schedule, **RATES, polar={"dtype": "bfloat16"})
    theirs = referred(name, grads, SMALL, schedule, **RATES, **REFERENCE_POLAR)
    for parameter in MATRICES:
        error = normwise(ours[parameter] - theirs[parameter], theirs[parameter] - start[parameter])
        record_property(f"{name} {parameter}", f"{error:.2e}")
        assert 1e-5 < error < 0.15 / 4, parameter


@pytest.mark.parametrize(("schedule", "steps"), [("you", 5), ("polar_express", 5), ("polar_express", 8)])
def test_other_schedules(schedule: str, steps: int) -> None:
    options = {"schedule": schedule, "steps": steps}
    grads = random_grads(10)
    ours = trained("Muonlight", grads, 0.0, polar={**FP32_POLAR["polar"], **options})
    theirs = referred("Muonlight", grads, 0.0, polar={**REFERENCE_POLAR["polar"], **options})
    for parameter in MATRICES:
        assert normwise(ours[parameter] - theirs[parameter], theirs[parameter]) < 1e-3, parameter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-30, -1e30, 1.0])
def test_constant_gradients_of_any_size(name: str, value: float) -> None:
    """Three steps from 0: fp32 squares of 1e-30 vanish and of 1e30 overflow, and neither may be seen."""
    grads = constant_grads(value, 3)
    # (Weights 0 have no singular vectors: what SpectralLion's other basis does with them is in test_spectral_lion.py.)
    hyper, scale = RATES, FIRST.get(name, 0.0)
    ours = trained(name, grads, scale, **for_package(name, hyper))
    theirs = referred(name, grads, scale, **for_reference(name, hyper))
    for parameter, expected in theirs.items():
        assert np.abs(expected).max() > 0
        assert np.isfinite(ours[parameter]).all()
        tolerance = 1e-3 if orthogonalized(name, {}, parameter) else 1e-6
        assert worst(ours[parameter] - expected, expected) < tolerance, parameter


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_decays_and_nothing_else(name: str) -> None:
    grads = constant_grads(0.0, 3)
    start = weights_of(SmallModel())
    ours, theirs = trained(name, grads, **RATES), referred(name, grads, **RATES)
    for parameter, expected in theirs.items():
        np.testing.assert_allclose(ours[parameter], expected, rtol=3e-7)
        if start[parameter].ndim < 2:
            np.testing.assert_array_equal(ours[parameter], start[parameter])


@pytest.mark.parametrize("name", NAMES)
def test_default_decay_is_that_of_the_spec(name: str) -> None:
    """One step of gradient 0 moves a weight by eta lambda of itself, eta being the step's own."""
    grads = constant_grads(0.0, 1)
    start = weights_of(SmallModel())
    ours, theirs = trained(name, grads), referred(name, grads)
    for parameter, expected in theirs.items():
        # fp32 rounds 1 - eta lambda and the product, each by 6e-8 of the weight; the smallest default is 1e-5.
        np.testing.assert_allclose(
            (ours[parameter] - start[parameter]) / start[parameter],
            (expected - start[parameter]) / start[parameter],
            atol=1.3e-7,
        )


def test_a_parameter_without_gradient_stands_still_and_the_rest_steps() -> None:
    grads = random_grads(6)
    for index, absent in enumerate(["tall.weight", "embed.weight", "gain", "tall.weight"]):
        del grads[index + 1][absent]
    for name in ("Lion", "LionMuon"):
        ours = trained(name, grads, 0.0, **for_package(name, RATES))
        theirs = referred(name, grads, 0.0, **for_reference(name, RATES))
        for parameter, expected in theirs.items():
            assert normwise(ours[parameter] - expected, expected) < 1e-3, (name, parameter)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_parameter_is_left_alone(name: str) -> None:
    model = SmallModel()
    for frozen in (model.square.weight, model.gain):
        frozen.requires_grad_(False)
    before = weights_of(model)
    grads = [{n: g for n, g in entry.items() if n not in ("square.weight", "gain")} for entry in random_grads(2)]
    take_steps(model, build(name, model, **RATES), grads)
    after = weights_of(model)
    for parameter in before:
        still = parameter in ("square.weight", "gain")
        assert (after[parameter] == before[parameter]).all() == still, parameter


def test_gradients_of_the_user_are_not_written() -> None:
    grads = random_grads(3)
    for name, hyper in CASES:
        model = SmallModel()
        optimizer = build(name, model, **{**RATES, **hyper})
        for entry in grads:
            for parameter, p in model.named_parameters():
                p.grad = entry[parameter].clone()
            mine = {parameter: p.grad for parameter, p in model.named_parameters()}
            optimizer.step()
            for parameter, p in model.named_parameters():
                after = p.grad
                assert after is not None
                assert after is mine[parameter]
                assert torch.equal(after, entry[parameter]), (name, parameter)
