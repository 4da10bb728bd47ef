"""Bring a matrix's singular values into [0, 1]: norm and division in float32, then the cast down.

The order matters: raw directions near 1e-8 vanish in float16, normalized ones do not.

Norms have no floor but the smallest float32. The rule's eps, 1e-7, guards against 0 / 0; added to the norm as it comes,
it would count where only directions may: a gradient that a clip coefficient of 2e-8 has shrunk would fade. So x and sx
give one result, to the bit where s is a power of two, for every s that leaves float32 all entries; subnormal entries
have fewer bits, and count with those. Zero stays zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny
_SAFE_NORM = (1e-12, 1e12)
"""Norms between these lose nothing that counts: entries whose squares vanish are below 1e-10 of the norm."""


def prescaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """(s * x, s): a fresh contiguous float32 tensor (..., m, n) and a power of two for each matrix, (..., 1, 1).

    s brings the largest entry into [1, 4). Squares of entries above 1e19 overflow float32 and those below
    1e-23 are lost, so norms are taken of s * x. A power of two moves exponents only: sx / ||sx|| has the bits of
    x / ||x|| wherever the latter neither over- nor underflows.
    """
    scaled = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    scale = _power_of_two(_norm(scaled, float("inf")))
    return scaled.mul_(scale), scale


def nan_where_broken(x: Tensor) -> Tensor:
    """For LAPACK, which raises where it meets NaN, on one rank while the others wait: matrices of x (..., m, n) with
    NaN or infinity become zero in place. Returns NaN for those and 0 for the others, (..., 1, 1), to add to what is
    made of them: so they give NaN, as in any product.
    """
    broken = _norm(x, float("inf")).mul_(0.0)
    x.masked_fill_(broken.isnan(), 0.0)
    return broken


def normalized(x: Tensor, *, dtype: torch.dtype, safety: float) -> Tensor:
    """x / (safety * ||x||_F), 0 for 0, x (..., m, n), as a fresh contiguous tensor in ``dtype``."""
    if x.device.type == "cpu" and x.dim() == 2:
        # Two passes less. Only where the sum of squares is in no danger, where a power of two changes no bit; asking
        # costs nothing on a CPU.
        copy = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
        norm = _norm(copy, 2)
        if _SAFE_NORM[0] < float(norm) < _SAFE_NORM[1]:
            return copy.div_(norm.mul_(safety)).to(dtype)
    scaled, _ = prescaled(x)
    return scaled.div_(_norm(scaled, 2).mul_(safety).clamp_min_(_TINY)).to(dtype)


def schatten4_rescale(x: Tensor, gram: Tensor, *, safety: float) -> None:
    """Divide x, of Frobenius norm 1, by safety * ||XX'||_F^(1/2) in place, and ``gram`` = XX' to match.

    ||XX'||_F^(1/2) = (sum sigma^4)^(1/4) lies between the largest singular value and the Frobenius norm.
    x: (..., s, l), gram: (..., s, s).
    """
    norm = _norm(gram, 2).sqrt_().mul_(safety).clamp_min_(_TINY**0.5)  # its square is a divisor, too
    x.div_(norm)
    gram.div_(norm.square_())


def _norm(x: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(x, ord=order, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def _power_of_two(largest: Tensor) -> Tensor:
    # From the exponent's bits: pow() and exp2() need not be exact on every device.
    exponent = largest.view(torch.int32) >> 23
    return ((254 - exponent).clamp_(1, 253) << 23).view(torch.float32)
