"""A factor on the gradient changes no step of a matrix rule, and what is not finite raises nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ds_optim
from ds_optim.matrix.polar import PolarSpec, polar
from ds_optim.matrix.schedules import schedule
from ds_optim.matrix.shapes import POLAR, SIGN_POLAR, WEIGHT_BASIS, Shape, smallest_gap
from tests.cases import CASES

NAN, INF = math.nan, math.inf
#: Times entries between 1e-3 and 10: from 1e-30 to 1e30.
EXPONENTS = st.integers(-90, 96)


def gauss(*shape: int, seed: int = 0) -> Tensor:
    """Entries between 1e-3 and 4 in size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    return torch.where(x.abs() < 1e-3, 1e-3, x)


specs = st.builds(
    lambda table, method, normalize, dtype: PolarSpec(
        schedule=table[0], steps=table[1], method=method, normalize=normalize, dtype=dtype
    ),
    st.sampled_from([("keller", 5), ("keller", 1), ("you", 5), ("polar_express", 5), ("polar_express", 8)]),
    st.sampled_from(["standard", "gram", "svd"]),
    st.sampled_from(["frobenius", "schatten4"]),
    st.sampled_from(["float32", "bfloat16"]),
)
sides = st.sampled_from([(24, 70), (70, 24), (9, 9), (1, 17), (1, 1)])


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([POLAR, SIGN_POLAR, WEIGHT_BASIS]), specs, sides, EXPONENTS, st.integers(0, 1))
def test_shapes_see_directions_alone(
    shape: Shape, spec: PolarSpec, sides: tuple[int, int], exponent: int, rank: int
) -> None:
    """To the bit by a power of two, for full rank and for a matrix that is all but one of rank 1."""
    w, x = gauss(1, *sides, seed=1), gauss(1, *sides, seed=2)
    x = (x if rank else x[..., :1] * x[..., :1, :] + 1e-3 * x).to(spec.message_dtype)
    beside = [w] if shape.weights else []
    (scaled,), (plain,) = (shape.solve([c, *beside], spec) for c in (x * 2.0**exponent, x))
    assert torch.equal(scaled, plain)


@settings(max_examples=40, deadline=None)
@given(specs, sides, st.floats(-28, 28))
def test_any_factor_changes_no_more_than_rounding(spec: PolarSpec, sides: tuple[int, int], power: float) -> None:
    x = gauss(1, *sides).to(spec.message_dtype)
    want = polar(x, spec).double()
    got = polar((x.double() * 10**power).to(spec.message_dtype), spec).double()
    # The message is rounded anew: one place of its dtype an entry, which the iteration spreads, and which its
    # polynomials enlarge where they are steep.
    bound = want.norm() + _steepness(x, spec)
    assert (got - want).norm() < 60 * torch.finfo(spec.message_dtype).eps * bound


def _steepness(x: Tensor, spec: PolarSpec) -> float:
    """Norm of what the iteration makes of a relative change of each singular value, per change: |sigma f'(sigma)|."""
    if spec.method == "svd":
        return 0.0
    table = schedule(spec.schedule, spec.steps)
    sigma = torch.linalg.svdvals(x.double())
    sigma /= table.safety * sigma.norm(p=4 if spec.normalize == "schatten4" else 2)
    value, slope = sigma, torch.ones_like(sigma)
    for a, b, c in table.triples:
        slope = slope * (a + 3 * b * value**2 + 5 * c * value**4)
        value = a * value + b * value**3 + c * value**5
    return float((sigma * slope).norm())


ALWAYS = {"LionMuon": {"period": 1}, "MiMuon": {"tau": 0.0}}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("Muon", {"polar": {"normalize": "schatten4", "schedule": "polar_express"}}),
    *((case.type, {**case.option, **ALWAYS.get(case.type, {})}) for case in CASES.values() if case.has_matrices),
]


@pytest.mark.parametrize("exponent", [-90, -50, -25, 60, 96])
@pytest.mark.parametrize(("name", "options"), RULES)
def test_rules_step_alike_for_gradients_of_any_size(name: str, options: dict[str, Any], exponent: int) -> None:
    """2^-25 is what gradients are multiplied by that are clipped with a coefficient of 3e-8."""

    def stepped(size: float) -> Tensor:
        layer = nn.Linear(40, 12, bias=False)
        layer.weight.data.copy_(gauss(12, 40, seed=3))
        optimizer = getattr(ds_optim, name)(ds_optim.param_groups(layer), lr=0.01, weight_decay=0.0, **options)
        for seed in (4, 5, 6):
            layer.weight.grad = size * gauss(12, 40, seed=seed)
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(stepped(2.0**exponent), stepped(1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
def test_subnormal_entries_count_with_the_bits_they_have(normalize: str, dtype: str) -> None:
    spec = PolarSpec(normalize=normalize, dtype=dtype)
    grid = (8 * gauss(1, 24, 70)).round()  # whole numbers below 33: subnormal multiples hold them all
    assert torch.equal(polar((grid * 2.0**-130).to(spec.message_dtype), spec), polar(grid.to(spec.message_dtype), spec))
    assert not polar(torch.zeros(1, 24, 70, dtype=spec.message_dtype), spec).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 1)])
def test_svd_of_what_is_not_finite_is_nan_and_its_neighbours_are_sound(shape: tuple[int, int], value: float) -> None:
    x = gauss(3, *shape)
    sound = polar(x, PolarSpec(method="svd"))
    x[1, 0, 0] = value
    for method in ("svd", "standard"):
        got = polar(x, PolarSpec(method=method, dtype="float32"))
        assert bool(got[1].isnan().all()), method
        assert bool(got[::2].isfinite().all()), method
    assert torch.equal(polar(x, PolarSpec(method="svd"))[::2], sound[::2])
    spec = PolarSpec(method="svd", dtype="float32")
    for direction, weights in ((x, gauss(3, *shape, seed=1)), (gauss(3, *shape, seed=1), x)):
        (solved,) = WEIGHT_BASIS.solve([direction, weights], spec)
        assert bool(solved[::2].ne(0).any()), "neighbours step"
        assert not solved[1].any(), "a sign of NaN is 0"
    gaps = smallest_gap(x)
    assert bool(gaps[1].isnan())
    assert not gaps[::2].isnan().any()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_smallest_gap_is_between_positive_singular_values(size: float) -> None:
    def gap(*sigma: float, shape: tuple[int, int] = (5, 8)) -> float:
        u, _ = torch.linalg.qr(gauss(shape[0], len(sigma), seed=1).double())
        v, _ = torch.linalg.qr(gauss(shape[1], len(sigma), seed=2).double())
        x = size * (u * torch.tensor(sigma, dtype=torch.float64)) @ v.mT
        return float(smallest_gap(x.float()[None])) / size

    assert gap(5, 4, 3.5, 2, 1) == pytest.approx(0.5, rel=1e-5)
    assert gap(5, 4, 2) == pytest.approx(1, rel=1e-5), "of rank 3: no gap between its zeros, none down to them"
    assert gap(5, 4.5, 0.25) == pytest.approx(0.5, rel=1e-5)
    assert gap(3) == gap(3, shape=(1, 8)) == gap(0) == INF
