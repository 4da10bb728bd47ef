"""SpectralLion's bases: what they are to the letter of the source, and what they make of degenerate matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.matrix.shapes import normalized_in_weight_basis
from tests.reference import Array, exact_polar

BASES = ["weight", "momentum", "gradient"]
SHAPES = [(13, 5), (5, 13), (8, 8), (40, 3), (6, 1), (1, 6), (1, 1)]
LR = 2.0**-6
"""A power of two: weights that are multiples of it stay so, and a step is exact."""
EPS = 1e-8
NEAR_ZERO = 1e-4
"""Of the largest entry: fp32 singular vectors, gaps of the singular values a tenth of them, are good to 1e-5."""


def with_singular_values(m: int, n: int, values: list[float], seed: int) -> Array:
    """A matrix (m, n) with these singular values and random vectors."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.standard_normal((m, min(m, n))))
    v, _ = np.linalg.qr(draw.standard_normal((n, min(m, n))))
    return (u * np.array(values)) @ v.T


def distinct(m: int, n: int, seed: int) -> Array:
    """Singular values 1, 1.3, 1.6, ... and so of distinct squares, in fp32."""
    values = [1 + 0.3 * number for number in range(min(m, n))]
    return with_singular_values(m, n, values, seed).astype(np.float32).astype(np.float64)


def gauss(m: int, n: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32).astype(np.float64)


def project_normalize_rebuild(c: Array, w: Array, *, full: bool = True) -> Array:
    """The source's method, to the letter: U'CV, its columns normalized, U(..)V', of W as the tall matrix it is; its
    eps for a C of largest entry 1.
    """
    if w.shape[0] < w.shape[1]:
        return project_normalize_rebuild(c.T, w.T, full=full).T
    c = c / np.abs(c).max()
    u, _, vt = np.linalg.svd(w, full_matrices=full)
    projected = u.T @ c @ vt.T
    return u @ (projected / (np.linalg.norm(projected, axis=0) + EPS)) @ vt


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(x).float()


def distance(ours: Array, theirs: Array) -> float:
    """Of two directions, each up to a positive factor."""
    factor = (ours * theirs).sum() / (ours * ours).sum()
    assert factor > 0
    return float(np.linalg.norm(factor * ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e30])
def test_weight_basis_is_the_literal_method_with_all_left_vectors(shape: tuple[int, int], size: float) -> None:
    """Before the sign, whatever the direction's size."""
    w = distinct(*shape, seed=1)
    c = tensor(size * gauss(*shape, seed=2))
    ours = normalized_in_weight_basis(c, tensor(w)).double().numpy()
    # In fp64 nothing of this over- or underflows.
    assert distance(ours, project_normalize_rebuild(c.double().numpy(), w)) < 3e-5


@pytest.mark.parametrize("shape", [(13, 5), (5, 13)])
def test_thin_left_vectors_are_another_method(shape: tuple[int, int]) -> None:
    """What lies outside of W's columns is lost with them: the comparison above can tell."""
    c, w = gauss(*shape, seed=2), distinct(*shape, seed=1)
    assert distance(project_normalize_rebuild(c, w, full=False), project_normalize_rebuild(c, w)) > 0.1


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_only_the_weights_directions_count(size: float) -> None:
    """W'W of weights this large or small would over- or underflow in fp32."""
    c, w = tensor(gauss(9, 4, seed=2)), tensor(distinct(9, 4, seed=1))
    scaled = normalized_in_weight_basis(c, size**2 * w)
    assert distance(scaled.double().numpy(), normalized_in_weight_basis(c, w).double().numpy()) < 3e-5


# ---------------------------------------------------------------------------------------------- the optimizer


class OneMatrix(nn.Module):
    def __init__(self, values: Array) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor(values))


def moved(values: Array, grads: list[Array], **hyper: Any) -> list[Array]:
    """Of every step, (weights before - weights after) / LR."""
    model = OneMatrix(values)
    optimizer = ds_optim.SpectralLion(ds_optim.param_groups(model), lr=LR, weight_decay=0.0, **hyper)
    steps = []
    for grad in grads:
        before = model.weight.detach().clone()
        model.weight.grad = tensor(grad)
        optimizer.step()
        steps.append(((before - model.weight.detach()) / LR).double().numpy())
    return steps


def on_grid(values: Array) -> Array:
    """To multiples of LR."""
    return np.round(values / LR) * LR


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 1 not in shape])
@pytest.mark.parametrize("basis", BASES)
def test_steps_are_signs_of_the_literal_method(shape: tuple[int, int], basis: str) -> None:
    b1, b2 = 0.9, 0.99
    w, m = on_grid(distinct(*shape, seed=3)), np.zeros(shape)
    grads = [gauss(*shape, seed=seed) for seed in (4, 5, 6)]
    signs, skipped = moved(w, grads, basis=basis, betas=(b1, b2)), 0
    for given, ours in zip(grads, signs, strict=True):
        grad = exact_polar(given) if basis == "gradient" else given
        c = b1 * m + (1 - b1) * grad
        direction = c
        if basis != "gradient":
            direction = project_normalize_rebuild(c, w) if basis == "weight" else exact_polar(c)
        clear = np.abs(direction) > NEAR_ZERO * np.abs(direction).max()
        skipped += int((~clear).sum())
        np.testing.assert_array_equal(ours[clear], np.sign(direction)[clear])
        assert set(np.unique(ours)) <= {-1.0, 0.0, 1.0}
        w, m = w - LR * ours, b2 * m + (1 - b2) * grad
    assert skipped <= 1


def test_bases_are_told_apart() -> None:
    w, grads = on_grid(distinct(8, 8, seed=3)), [gauss(8, 8, seed=4), 0.01 * gauss(8, 8, seed=5)]
    steps = {basis: moved(w, grads, basis=basis) for basis in BASES}
    assert (steps["weight"][0] != steps["momentum"][0]).any()
    # The first steps are alike: the signs of one gradient's polar factor.
    np.testing.assert_array_equal(steps["gradient"][0], steps["momentum"][0])
    assert (steps["gradient"][1] != steps["momentum"][1]).any()


def test_without_momentum_gradient_and_momentum_basis_are_one() -> None:
    grads = [gauss(9, 5, seed=seed) for seed in (4, 5, 6)]
    one, other = (moved(np.zeros((9, 5)), grads, basis=basis, betas=(0.0, 0.9)) for basis in ("gradient", "momentum"))
    np.testing.assert_array_equal(one, other)


DEGENERATE: dict[str, Any] = {
    "repeated singular values": lambda m, n: 3 * with_singular_values(m, n, [1.0] * min(m, n), seed=7),
    "one pair repeated": lambda m, n: with_singular_values(m, n, [2.0, *[1.0] * (min(m, n) - 1)], seed=7),
    "identity": np.eye,
    "ones": lambda m, n: np.ones((m, n)),
    "zero": lambda m, n: np.zeros((m, n)),
    "rank 1": lambda m, n: np.outer(np.arange(1, m + 1), np.arange(n) - 1.5) / 4,
    "small and large": lambda m, n: distinct(m, n, seed=1) * np.logspace(-20, 15, n),
    "tiny": lambda m, n: 1e-30 * gauss(m, n, seed=8),
    "huge": lambda m, n: 1e30 * gauss(m, n, seed=8),
}


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("shape", "heads"), [((7, 4), 1), ((4, 7), 1), ((5, 5), 1), ((3, 4), 3)])
@pytest.mark.parametrize("weights", DEGENERATE)
def test_degenerate_matrices_move_by_signs(weights: str, shape: tuple[int, int], heads: int, basis: str) -> None:
    """Every kind of weights with every kind of direction: each weight stands, or goes one step up or down."""
    start = DEGENERATE[weights](*shape)
    for kind, make in DEGENERATE.items():
        model = OneMatrix(start)
        before = model.weight.detach().clone()
        groups = ds_optim.param_groups(model, views=[{"match": "weight", "heads": heads}])
        optimizer = ds_optim.SpectralLion(groups, lr=LR, weight_decay=0.0, basis=basis)
        model.weight.grad = tensor(make(*shape))
        optimizer.step()
        after = model.weight.detach()
        assert after.isfinite().all(), kind
        steps = (after == before) | (after == before - LR) | (after == before + LR)
        assert steps.all(), kind
        # Where weights are so large that a step is below their last bit, nothing can be seen of it.
        if weights not in ("huge", "small and large"):
            assert (after == before).all() == (kind == "zero"), kind


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_polar_bases_of_a_direction_of_rank_1_are_its_sign(shape: tuple[int, int]) -> None:
    """Its polar factor is itself over its norm: directions that are not there may not be made up."""
    direction = np.outer(np.arange(1, shape[0] + 1), np.arange(shape[1]) - 1.5) / 4
    for basis in ("momentum", "gradient"):
        (ours,) = moved(np.zeros(shape), [direction], basis=basis)
        np.testing.assert_array_equal(ours, np.sign(direction))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("size", [2.0**-96, 2.0**-27, 2.0**96])
def test_size_of_a_gradient_changes_no_sign(basis: str, size: float) -> None:
    w, grad = on_grid(distinct(6, 9, seed=3)), gauss(6, 9, seed=4)
    (ours,) = moved(w, [size * grad], basis=basis)
    np.testing.assert_array_equal(ours, moved(w, [grad], basis=basis)[0])


@pytest.mark.parametrize("basis", BASES)
def test_a_zero_gradient_moves_nothing_and_momentum_goes_on(basis: str) -> None:
    """From momentum 0 no step; after a first gradient the momentum alone still has a direction."""
    w, grad = on_grid(distinct(6, 4, seed=3)), gauss(6, 4, seed=4)
    zero = np.zeros((6, 4))
    still, first, second = moved(w, [zero, grad, zero], basis=basis)
    assert not still.any()
    assert first.all()
    assert second.all()
