"""Newton-Schulz iterations: X <- aX + (bA + cAA)X with A = XX', or X <- aX + X(bA + cAA) with A = X'X.

Both forms take x (m, n) or (B, m, n), in any float dtype, and return a fresh contiguous tensor in the compute dtype.
A stands on the short side s: a tall matrix is multiplied from the right, which saves two transposed copies. Every
s x s product is symmetric and may be cut into ``strips`` (symmetric.py). Products of two-dimensional tensors never
see a batch, and all operands lie at fixed places of fresh allocations, so that a CPU's kernels, which choose their
path by shape, stride and alignment, give one matrix always the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_optim.matrix import symmetric
from ds_optim.matrix.normalize import normalized, schatten4_rescale
from ds_optim.matrix.schedules import Schedule, Triple


def standard(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int = 1) -> Tensor:
    """The textbook form: 4 s^2 l + 2 s^3 flops a step; allocates X, its ping-pong partner, A and B."""
    x, a_matrix = _start(x, table, dtype=dtype, schatten4=schatten4, strips=strips)
    b_matrix = symmetric.empty(x, strips)
    spare = torch.empty_like(x)
    for step, triple in enumerate(table.triples):
        if step > 0:
            _gram(x, out=a_matrix, strips=strips)
        _step(x, a_matrix, triple, b_matrix=b_matrix, out=spare, strips=strips)
        x, spare = spare, x
    return x


def gram(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int = 1) -> Tensor:
    """The Gram form: in segments of several steps iterate on R = XX' alone, and apply their product Q to X once.

    4 s^2 l flops a segment and 8 s^3 a step, less what the first and last step of a segment save. A segment of one
    step is a step of the standard form.
    """
    x, r = _start(x, table, dtype=dtype, schatten4=schatten4, strips=strips)
    z, q, spare = (symmetric.empty(x, strips) for _ in range(3))
    x_spare = torch.empty_like(x)
    done = 0
    for length in gram_segments(table, dtype):
        triples = table.triples[done : done + length]
        if done > 0:
            _gram(x, out=r, strips=strips)
        if length == 1:
            _step(x, r, triples[0], b_matrix=z, out=x_spare, strips=strips)
        else:
            factor = _factor(r, triples, z=z, q=q, spare=spare, strips=strips)
            _matmul(*_sides(factor, x), out=x_spare)
        x, x_spare = x_spare, x
        done += length
    return x


def gram_segments(table: Schedule, dtype: torch.dtype) -> tuple[int, ...]:
    """How many steps run between restarts: 5 are (2, 2, 1) where none must go alone.

    R is rounded by an absolute 2^-9 of its norm in bfloat16, whatever is left of small singular values, and each step
    that X is not looked at multiplies that by up to a^2. So two steps go together at most, in 16 bits none of the
    first ``table.alone``, and never the last one: what it gets has been looked at, so that singular values end within
    the schedule's range. With (2, 3) they left it: by a fifth for keller, without bounds for polar_express.
    """
    steps = len(table.triples)
    alone = 0 if dtype == torch.float32 else min(table.alone, steps)
    pairs = max(0, steps - alone - 1) // 2
    return (1,) * alone + (2,) * pairs + (1,) * (steps - alone - 2 * pairs)


def gram_products(length: int) -> int:
    """s x s x s products of a segment, all symmetric: four a step, less one in the first step and two in the last."""
    return max(1, 4 * length - 3)


def _start(x: Tensor, table: Schedule, *, dtype: torch.dtype, schatten4: bool, strips: int) -> tuple[Tensor, Tensor]:
    """X normalized, and its Gram matrix A, which the Schatten-4 norm needs first and the first step then reuses."""
    x = normalized(x, dtype=dtype, safety=1.0 if schatten4 else table.safety)
    a_matrix = symmetric.empty(x, strips)
    _gram(x, out=a_matrix, strips=strips)
    if schatten4:
        schatten4_rescale(x, a_matrix, safety=table.safety)
    return x, a_matrix


def _step(x: Tensor, a_matrix: Tensor, triple: Triple, *, b_matrix: Tensor, out: Tensor, strips: int) -> None:
    """out <- aX + BX with B = bA + cAA, which is left in ``b_matrix``."""
    a, b, c = triple
    symmetric.addmm(a_matrix, a_matrix, a_matrix, beta=b, alpha=c, out=b_matrix, strips=strips)
    _addmm(x, *_sides(b_matrix, x), beta=a, alpha=1.0, out=out)


def _factor(r: Tensor, triples: Sequence[Triple], *, z: Tensor, q: Tensor, spare: Tensor, strips: int) -> Tensor:
    """The Q of several steps, QX their result, from R = XX'; in ``q`` or ``spare``, and all four are overwritten.

    With Z = bR + cRR one step is X <- (aI + Z)X, so Q <- (aI + Z)Q and R <- (aI + Z)R(aI + Z), all s x s, commuting
    and symmetric. R's outer products stand in the order that measured the smaller error. From a third factor on Q could
    not be cut into strips: a mirrored half has the factors in reverse, and their rounding is not damped.
    """
    for step, (a, b, c) in enumerate(triples):
        symmetric.addmm(r, r, r, beta=b, alpha=c, out=z, strips=strips)
        if step == 0:
            q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            symmetric.addmm(q, z, q, beta=a, alpha=1.0, out=spare, strips=strips)
            q, spare = spare, q
        if step < len(triples) - 1:
            symmetric.addmm(r, r, z, beta=a, alpha=1.0, out=spare, strips=strips)
            symmetric.addmm(spare, z, spare, beta=a, alpha=1.0, out=r, strips=strips)
    return q


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
