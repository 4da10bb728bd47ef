"""What a rule makes of a direction that is a whole matrix: the shapes of the family.

A shape says what travels to a matrix's owner, what it computes there, and what travels back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optim.matrix.normalize import prescaled
from ds_optim.matrix.polar import PolarSpec, cost, polar

COLUMN_EPS = 1e-8


@dataclass(frozen=True)
class Shape:
    """A function of whole matrices, C (B, m, n) -> (B, m, n).

    solve: (C, W or None, spec) -> the result. cost: modelled operations of one (m, n) matrix. weights: W travels
    to the owner too, in fp32. result: the dtype of what comes back; None for C's.
    """

    name: str
    solve: Callable[[Tensor, Tensor | None, PolarSpec], Tensor]
    cost: Callable[[int, int, PolarSpec], float]
    weights: bool = False
    result: torch.dtype | None = None


def _polar(c: Tensor, w: Tensor | None, spec: PolarSpec) -> Tensor:
    return polar(c, spec)


def _sign_polar(c: Tensor, w: Tensor | None, spec: PolarSpec) -> Tensor:
    return polar(c, spec).sign_().to(torch.int8)


def _weight_basis(c: Tensor, w: Tensor | None, spec: PolarSpec) -> Tensor:
    assert w is not None
    if c.device.type != "cpu":
        return normalized_in_weight_basis(c, w).sign_().to(torch.int8)
    # As in polar: each matrix alone, so that its bits do not depend on its neighbours in the stack.
    out = torch.empty(c.shape, dtype=torch.int8, device=c.device)
    for result, direction, weights in zip(out, c, w, strict=True):
        result.copy_(normalized_in_weight_basis(direction, weights).sign_())
    return out


def _weight_basis_cost(m: int, n: int, spec: PolarSpec) -> float:
    """W'W, C V and R V' at 2 s^2 l each; the symmetric eigenproblem about 9 s^3."""
    short, long = float(min(m, n)), float(max(m, n))
    return 6 * short * short * long + 9 * short**3


POLAR = Shape("polar", _polar, cost)
SIGN_POLAR = Shape("sign of polar", _sign_polar, cost, result=torch.int8)
WEIGHT_BASIS = Shape("sign in the weights' basis", _weight_basis, _weight_basis_cost, weights=True, result=torch.int8)


def normalized_in_weight_basis(c: Tensor, w: Tensor) -> Tensor:
    """R V' with R = C V, each column of R divided by its norm + 1e-8: c, w (..., m, n) -> (..., m, n) in fp32.

    V are the right singular vectors of w in its tall orientation, from the eigenvectors of W'W in fp32. Up to a
    positive factor: c is brought to a size at which nothing over- or underflows. Singular values of w that
    repeat leave V free, and the result with it; it is finite always.
    """
    if c.shape[-2] < c.shape[-1]:
        return normalized_in_weight_basis(c.mT, w.mT).mT
    with torch.no_grad():
        basis, _ = prescaled(w)
        _, v = torch.linalg.eigh(basis.mT @ basis)
        scaled, scale = prescaled(c)
        r = scaled @ v
        norm = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
        return r.div_(norm.add_(COLUMN_EPS * scale)) @ v.mT


def smallest_gap(matrices: Tensor) -> Tensor:
    """The smallest gap between singular values: (B, m, n) -> (B,); infinity for matrices that have but one."""
    sigma = torch.linalg.svdvals(matrices.float())
    if sigma.shape[-1] == 1:
        return torch.full(sigma.shape[:1], math.inf, dtype=sigma.dtype, device=sigma.device)
    return (sigma[:, :-1] - sigma[:, 1:]).amin(dim=-1)
