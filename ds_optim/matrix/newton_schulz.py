"""Newton-Schulz iterations: X <- aX + (bA + cAA)X with A = XX', or X <- aX + X(bA + cAA) with A = X'X.

Both forms take x (m, n) or (B, m, n), in any float dtype, and return a fresh contiguous tensor in the compute dtype.
A stands on the short side s: a tall matrix is multiplied from the right, which saves two transposed copies. Every
s x s product is symmetric and may be cut into ``strips`` (symmetric.py). Products of two-dimensional tensors never
see a batch, and all operands lie at fixed places of fresh allocations, so that a CPU's kernels, which choose their
path by shape, stride and alignment, give one matrix always the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.matrix import symmetric
from ds_optim.matrix.normalize import normalized, schatten4_rescale, unit_norm
from ds_optim.matrix.schedules import Schedule

# Steps between restarts of the Gram form. The Gram matrix squares the condition number, and rounding in it
# grows with each step that the true X is not looked at: the first steps move singular values most, so they
# come in twos.
_FIRST_SEGMENT = 2
_SEGMENT = 3


def standard(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int = 1) -> Tensor:
    """The textbook form: 4 s^2 l + 2 s^3 flops a step; allocates X, its ping-pong partner, A and B."""
    x, a_matrix = _start(x, table, dtype=dtype, schatten4=schatten4, strips=strips)
    b_matrix = symmetric.empty(x, strips)
    spare = torch.empty_like(x)
    for step, (a, b, c) in enumerate(table.triples):
        if step > 0:
            _gram(x, out=a_matrix, strips=strips)
        symmetric.addmm(a_matrix, a_matrix, a_matrix, beta=b, alpha=c, out=b_matrix, strips=strips)
        left, right = _sides(b_matrix, x)
        _addmm(x, left, right, beta=a, alpha=1.0, out=spare)
        x, spare = spare, x
    return x


def gram(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int = 1) -> Tensor:
    """The Gram form: iterate on R = XX' alone, collect the left factor Q, and apply it to X once a segment.

    With Z = bR + cRR one step is X <- (aI + Z)X, so Q <- (aI + Z)Q and R <- (aI + Z)R(aI + Z), all s x s, commuting
    and symmetric. 4 s^2 l flops a segment and 8 s^3 a step, less what the first and last step of a segment save.

    The third factor of Q is multiplied in whole: later factors damp the rounding of earlier ones, in this order alone,
    and a mirrored half has the reverse one. In bfloat16 that doubled the error of ill-conditioned matrices; with two
    factors there is nothing to see. R's outer products stand in the order that measured the smaller error.
    """
    x, r = _start(x, table, dtype=dtype, schatten4=schatten4, strips=strips)
    z, q, spare = (symmetric.empty(x, strips) for _ in range(3))
    x_spare = torch.empty_like(x)
    done = 0
    for length in gram_segments(len(table.triples)):
        if done > 0:
            _gram(x, out=r, strips=strips)
        for step, (a, b, c) in enumerate(table.triples[done : done + length]):
            symmetric.addmm(r, r, r, beta=b, alpha=c, out=z, strips=strips)
            if step == 0:
                q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                symmetric.addmm(q, z, q, beta=a, alpha=1.0, out=spare, strips=strips if step == 1 else 1)
                q, spare = spare, q
            if step < length - 1:
                symmetric.addmm(r, r, z, beta=a, alpha=1.0, out=spare, strips=strips)
                symmetric.addmm(spare, z, spare, beta=a, alpha=1.0, out=r, strips=strips)
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


def gram_products(length: int) -> tuple[int, int]:
    """s x s x s products of a segment: (symmetric ones, whole ones).

    Together four a step, less one in the first step and two in the last; whole are those of Q from the third step on.
    """
    whole = max(0, length - 2)
    return max(1, 4 * length - 3) - whole, whole


def _start(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int) -> tuple[Tensor, Tensor]:
    """X normalized, and its Gram matrix A, which the Schatten-4 norm needs first and the first step then reuses."""
    if schatten4:
        x, eps = unit_norm(x, dtype=dtype)
    else:
        x = normalized(x, dtype=dtype, safety=table.safety)
    a_matrix = symmetric.empty(x, strips)
    _gram(x, out=a_matrix, strips=strips)
    if schatten4:
        schatten4_rescale(x, a_matrix, eps, safety=table.safety)
    return x, a_matrix


def _gram(x: Tensor, *, out: Tensor, strips: int) -> None:
    """XX' or X'X, whichever is smaller."""
    left = x if x.shape[-2] <= x.shape[-1] else x.mT
    symmetric.matmul(left, left.mT, out=out, strips=strips)


def _sides(square: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the product of an s x s matrix S with X, on the side where it fits: SX or XS'.

    S is symmetric but for rounding; transposed, the factors that it was multiplied from meet X in the right order.
    """
    return (square, x) if x.shape[-2] <= x.shape[-1] else (x, square.mT)


def _matmul(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    product = torch.mm if left.dim() == 2 else torch.bmm
    product(left, right, out=out)


def _addmm(acc: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float, out: Tensor) -> None:
    """out <- beta * acc + alpha * left @ right; out is none of the operands."""
    product = torch.addmm if left.dim() == 2 else torch.baddbmm
    product(acc, left, right, beta=beta, alpha=alpha, out=out)
