"""Newton-Schulz iterations: X <- aX + (bA + cAA)X with A = XX', or X <- aX + X(bA + cAA) with A = X'X.

Both forms take x (m, n) or (B, m, n), in any float dtype, and return a fresh contiguous tensor in the compute dtype.
A stands on the short side s: a tall matrix is multiplied from the right, which saves two transposed copies. Products
of two-dimensional tensors never see a batch, and all operands are whole allocations, so that a CPU's kernels, which
choose their path by shape, stride and alignment, give one matrix always the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.matrix.normalize import normalized, schatten4_rescale, unit_norm
from ds_optim.matrix.schedules import Schedule

# Steps between restarts of the Gram form. The Gram matrix squares the condition number, and rounding in it
# grows with each step that the true X is not looked at: the first steps move singular values most, so they
# come in twos.
_FIRST_SEGMENT = 2
_SEGMENT = 3


def standard(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool) -> Tensor:
    """The textbook form: 4 s^2 l + 2 s^3 flops a step; allocates X, its ping-pong partner, A and B."""
    x, a_matrix = _start(x, table, dtype=dtype, schatten4=schatten4)
    b_matrix = torch.empty_like(a_matrix)
    spare = torch.empty_like(x)
    for step, (a, b, c) in enumerate(table.triples):
        if step > 0:
            _gram(x, out=a_matrix)
        _addmm(a_matrix, a_matrix, a_matrix, beta=b, alpha=c, out=b_matrix)
        left, right = _sides(b_matrix, x)
        _addmm(x, left, right, beta=a, alpha=1.0, out=spare)
        x, spare = spare, x
    return x


def gram(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool) -> Tensor:
    """The Gram form: iterate on R = XX' alone, collect the left factor Q, and apply it to X once a segment.

    With Z = bR + cRR one step is X <- (aI + Z)X, so Q <- (aI + Z)Q and R <- (aI + Z)R(aI + Z), all s x s and
    commuting. 4 s^2 l flops a segment and 8 s^3 a step, less what the first and last step of a segment save.
    """
    x, r = _start(x, table, dtype=dtype, schatten4=schatten4)
    z, q, spare = torch.empty_like(r), torch.empty_like(r), torch.empty_like(r)
    x_spare = torch.empty_like(x)
    done = 0
    for length in gram_segments(len(table.triples)):
        if done > 0:
            _gram(x, out=r)
        for step, (a, b, c) in enumerate(table.triples[done : done + length]):
            _addmm(r, r, r, beta=b, alpha=c, out=z)
            if step == 0:
                q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                _addmm(q, z, q, beta=a, alpha=1.0, out=spare)
                q, spare = spare, q
            if step < length - 1:
                _addmm(r, z, r, beta=a, alpha=1.0, out=spare)
                _addmm(spare, spare, z, beta=a, alpha=1.0, out=r)
        _matmul(*_sides(q, x), out=x_spare)
        x, x_spare = x_spare, x
        done += length
    return x


def gram_segments(steps: int) -> tuple[int, ...]:
    """How many steps run between restarts: 5 is (2, 3), 8 is (2, 3, 3)."""
    segments = [min(steps, _FIRST_SEGMENT)]
    while sum(segments) < steps:
        segments.append(min(steps - sum(segments), _SEGMENT))
    return tuple(segments)


def gram_products(length: int) -> int:
    """s x s x s products of a segment: four a step, less one in the first step and two in the last."""
    return max(1, 4 * length - 3)


def _start(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool) -> tuple[Tensor, Tensor]:
    """X normalized, and its Gram matrix A, which the Schatten-4 norm needs first and the first step then reuses."""
    if schatten4:
        x, eps = unit_norm(x, dtype=dtype)
    else:
        x = normalized(x, dtype=dtype, safety=table.safety)
    short = min(x.shape[-2:])
    a_matrix = torch.empty((*x.shape[:-2], short, short), dtype=dtype, device=x.device)
    _gram(x, out=a_matrix)
    if schatten4:
        schatten4_rescale(x, a_matrix, eps, safety=table.safety)
    return x, a_matrix


def _gram(x: Tensor, *, out: Tensor) -> None:
    """XX' or X'X, whichever is smaller."""
    if x.shape[-2] <= x.shape[-1]:
        _matmul(x, x.mT, out=out)
    else:
        _matmul(x.mT, x, out=out)


def _sides(symmetric: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the product of an s x s matrix with X, on the side where it fits."""
    return (symmetric, x) if x.shape[-2] <= x.shape[-1] else (x, symmetric)


def _matmul(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    product = torch.mm if left.dim() == 2 else torch.bmm
    product(left, right, out=out)


def _addmm(acc: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float, out: Tensor) -> None:
    """out <- beta * acc + alpha * left @ right; out is none of the operands."""
    product = torch.addmm if left.dim() == 2 else torch.baddbmm
    product(acc, left, right, beta=beta, alpha=alpha, out=out)
