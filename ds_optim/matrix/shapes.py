"""What a rule makes of a direction that is a whole matrix: the shapes of the family.

A shape says what travels to a matrix's owner, what it computes there, and what travels back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optim.matrix.normalize import nan_where_broken, prescaled
from ds_optim.matrix.polar import PolarSpec, cost, polar, scratch_elements
from ds_optim.matrix.precision import whole_fp32
from ds_optim.matrix.views import MatrixView, row_range

COLUMN_EPS = 1e-8


@dataclass(frozen=True)
class Part:
    """What goes into one message of an exchange: a value in ``dtype`` for each element of a matrix, or for each row."""

    dtype: torch.dtype
    per_row: bool = False

    def place(self, view: MatrixView, start: int, numel: int) -> tuple[int, int]:
        """Which of a parameter's values, first and last + 1, go with so many elements of it from ``start`` on."""
        return row_range(view.columns if self.per_row else 1, start, numel)


ELEMENTS, ROWS = Part(torch.float32), Part(torch.float32, per_row=True)
"""fp32 values of a matrix's elements, and of its rows."""


@dataclass(frozen=True)
class Shape:
    """A function of whole matrices, C (B, m, n) -> (B, m, n).

    solve: batches of what travels, in the order of ``there``, and a spec -> of what comes back, in that of ``back``.
    cost, scratch: modelled operations, and bytes held at once beside what comes back, of one (m, n) matrix. weights: W
    travels to the owner too, in fp32. rows: a value for each row (B, m), fp32, goes there and comes back, as state
    does. result: the dtype of what comes back; None for C's. of_factor: what is made of the polar factor's values, one
    by one, where that is all that is made of C, so that ranks may share a matrix. None for other shapes.
    """

    name: str
    solve: Callable[[Sequence[Tensor], PolarSpec], Sequence[Tensor]]
    cost: Callable[[int, int, PolarSpec], float]
    scratch: Callable[[int, int, PolarSpec], int]
    weights: bool = False
    rows: bool = False
    result: torch.dtype | None = None
    of_factor: Callable[[Tensor], Tensor] | None = None

    def there(self, polar: PolarSpec) -> tuple[Part, ...]:
        """What travels to the owner: C, W, rows."""
        return Part(polar.message_dtype), *([ELEMENTS] if self.weights else []), *([ROWS] if self.rows else [])

    def back(self, polar: PolarSpec) -> tuple[Part, ...]:
        """What comes back: the result, rows."""
        return Part(self.result or polar.message_dtype), *([ROWS] if self.rows else [])


def _polar(parts: Sequence[Tensor], spec: PolarSpec) -> Sequence[Tensor]:
    return [polar(parts[0], spec)]


def _sign_polar(parts: Sequence[Tensor], spec: PolarSpec) -> Sequence[Tensor]:
    return _signs(lambda c: polar(c.view(-1, *c.shape[-2:]), spec), parts)


def _signs(factor: Callable[..., Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """What ``factor`` makes of batches, or on a CPU, as in polar, of each matrix alone, so that its bits do not depend
    on its neighbours in the stack."""
    out = torch.empty(parts[0].shape, dtype=torch.int8, device=parts[0].device)
    for result, *given in zip(out, *parts, strict=True) if out.device.type == "cpu" else [(out, *parts)]:
        result.copy_(factor(*given).view(result.shape).sign_())
    return [out]


def _itself(factor: Tensor) -> Tensor:
    return factor


def _polar_scratch(m: int, n: int, spec: PolarSpec) -> int:
    return scratch_elements(m, n, spec) * spec.compute_dtype.itemsize


def _sign_polar_scratch(m: int, n: int, spec: PolarSpec) -> int:
    return _polar_scratch(m, n, spec) + m * n * spec.message_dtype.itemsize  # the factor, beside its signs


def _weight_basis(parts: Sequence[Tensor], spec: PolarSpec) -> Sequence[Tensor]:
    return _signs(normalized_in_weight_basis, parts)


def _weight_basis_cost(m: int, n: int, spec: PolarSpec) -> float:
    """W'W, C V and R V' at 2 s^2 l each; the symmetric eigenproblem about 9 s^3."""
    short, long = float(min(m, n)), float(max(m, n))
    return 6 * short * short * long + 9 * short**3


def _weight_basis_scratch(m: int, n: int, spec: PolarSpec) -> int:
    """In fp32: the product, its result and the basis; before them weights, direction and Gram matrix have gone."""
    short = min(m, n)
    return 4 * (2 * m * n + short * short + 2 * short)


POLAR = Shape("polar", _polar, cost, _polar_scratch, of_factor=_itself)
SIGN_POLAR = Shape("sign of polar", _sign_polar, cost, _sign_polar_scratch, result=torch.int8, of_factor=Tensor.sign_)
WEIGHT_BASIS = Shape(
    "sign in the weights' basis",
    _weight_basis,
    _weight_basis_cost,
    _weight_basis_scratch,
    weights=True,
    result=torch.int8,
)


def normalized_in_weight_basis(c: Tensor, w: Tensor) -> Tensor:
    """R V' with R = C V, each column of R divided by its norm + 1e-8: c, w (..., m, n) -> (..., m, n) in fp32.

    V are the right singular vectors of w in its tall orientation, from the eigenvectors of W'W in fp32. c is first
    brought to a largest entry in [1, 4), where nothing over- or underflows. Ours: 1e-8 belongs to that size, so that
    it guards against 0 / 0 alone; added to columns as they come it would make sign(C) of small gradients. Singular
    values of w that repeat leave V free, and the result with it; it is finite for finite c and w.
    """
    if c.shape[-2] < c.shape[-1]:
        return normalized_in_weight_basis(c.mT, w.mT).mT
    with torch.no_grad(), whole_fp32(c.device):
        basis, _ = prescaled(w)
        broken = nan_where_broken(basis)
        gram = basis.mT @ basis
        del basis
        _, v = torch.linalg.eigh(gram)
        del gram
        r = prescaled(c)[0] @ v
        norm = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
        return (r.div_(norm.add_(COLUMN_EPS)) @ v.mT).add_(broken)


def smallest_gap(matrices: Tensor) -> Tensor:
    """The smallest gap between positive singular values: (B, m, n) -> (B,); infinity where there are less than two of
    them, NaN for matrices that are not finite. Those within rounding of zero count as zeros.
    """
    scaled, scale = prescaled(matrices)
    broken = nan_where_broken(scaled)
    sigma = torch.linalg.svdvals(scaled)
    cutoff = sigma[:, :1] * (max(matrices.shape[-2:]) * torch.finfo(torch.float32).eps)
    gaps = (sigma[:, :-1] - sigma[:, 1:]).masked_fill_(sigma[:, 1:] <= cutoff, math.inf)
    none = gaps.new_full((len(gaps), 1), math.inf)  # a matrix may have but one
    return torch.cat((gaps, none), dim=1).amin(dim=-1) / scale[:, 0, 0] + broken[:, 0, 0]
