"""Products that are symmetric: one triangle of blocks is multiplied, the other one is its mirror image.

The square is cut into ``strips`` block columns; of each, the part from the diagonal down is one product of the
library's, written where it belongs. That is (k + 1) / 2k of the operations for k strips: 0.75, 0.625, 0.5625 for 2,
4, 8. More strips are more calls on smaller blocks, so which number wins is measured (``ds-optim bench polar --store``).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

#: Strips end on multiples of this, a cache line of 16-bit elements: kernels have slow paths for other widths.
_GRAIN = 32
_LINE_BYTES = 64


@lru_cache(maxsize=1024)
def edges(side: int, strips: int) -> tuple[int, ...]:
    """Where strips begin, and ``side`` at the end: at most ``strips`` of them, of one width but the last."""
    width = -(-side // (strips * _GRAIN)) * _GRAIN if strips > 1 else side
    return (*range(0, side, max(width, 1)), side)


def share(side: int, strips: int) -> float:
    """The part of a product's operations that is done: 1 for one strip, towards 1/2 for many."""
    cut = edges(side, strips)
    return sum((side - start) * (stop - start) for start, stop in pairwise(cut)) / max(side, 1) ** 2


def stride(side: int, dtype: torch.dtype, strips: int) -> int:
    """Elements from a row of an ``empty`` square to the next.

    With strips a cache line more than ``side``: columns of a power of two long rows all fall into the same few sets
    of a cache, and mirroring them took three to ten times as long.
    """
    return side + _LINE_BYTES // dtype.itemsize if len(edges(side, strips)) > 2 else side


def empty(x: Tensor, strips: int) -> Tensor:
    """An uninitialized (..., s, s) for x (..., m, n), s its short side: rows lie ``stride`` apart.

    What lies between rows is zero on a CPU: with AMX, oneDNN 3.12 multiplies the left factor's rows in bfloat16 up to
    the next 32 columns, with zeros there, and what an allocation held before may be NaN.
    """
    side = min(x.shape[-2:])
    rows = torch.empty((*x.shape[:-2], side, stride(side, x.dtype, strips)), dtype=x.dtype, device=x.device)
    if x.device.type == "cpu" and rows.shape[-1] > side:
        rows[..., side:].zero_()
    return rows[..., :side]


def matmul(left: Tensor, right: Tensor, *, out: Tensor, strips: int) -> None:
    """out <- left @ right, which must be symmetric: (..., s, k), (..., k, s) -> (..., s, s), neither of the two."""
    product = torch.mm if out.dim() == 2 else torch.bmm
    cut = edges(out.shape[-1], strips)
    if len(cut) == 2:  # small matrices: views would cost a tenth of what is multiplied
        product(left, right, out=out)
        return
    for start, stop in pairwise(cut):
        product(left[..., start:, :], right[..., start:stop], out=out[..., start:, start:stop])
    _mirror(out, cut)


def addmm(acc: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float, out: Tensor, strips: int) -> None:
    """out <- beta * acc + alpha * left @ right, which must be symmetric, as acc is. ``out`` is none of the three."""
    product = torch.addmm if out.dim() == 2 else torch.baddbmm
    cut = edges(out.shape[-1], strips)
    if len(cut) == 2:
        product(acc, left, right, beta=beta, alpha=alpha, out=out)
        return
    for start, stop in pairwise(cut):
        below = (..., slice(start, None), slice(start, stop))
        product(acc[below], left[..., start:, :], right[..., start:stop], beta=beta, alpha=alpha, out=out[below])
    _mirror(out, cut)


def _mirror(square: Tensor, cut: tuple[int, ...]) -> None:
    """The blocks above the diagonal, from those below."""
    for start, stop in pairwise(cut[:-1]):
        square[..., start:stop, stop:].copy_(square[..., stop:, start:stop].mT)
