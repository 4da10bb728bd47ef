"""Bring a matrix's singular values into [0, 1]: norm and division in float32, then the cast down.

The order matters: raw directions near 1e-8 vanish in float16, normalized ones do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7
_TINY = torch.finfo(torch.float32).tiny
_SAFE_NORM = (1e-12, 1e12)
"""Norms between these lose nothing that counts: entries whose squares vanish are below 1e-10 of the norm."""


def prescaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """(s * x, s): a fresh contiguous float32 tensor (..., m, n) and a power of two for each matrix, (..., 1, 1).

    s brings the largest entry into [1, 4). Squares of entries above 1e19 overflow float32 and those below
    1e-23 are lost, so norms are taken of s * x. A power of two moves exponents only: sx / (||sx|| + s eps)
    has the bits of x / (||x|| + eps) wherever the latter neither over- nor underflows, so ordinary input is
    rounded no differently.
    """
    scaled = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    scale = _power_of_two(_norm(scaled, float("inf")))
    return scaled.mul_(scale), scale


def normalized(x: Tensor, *, dtype: torch.dtype, safety: float) -> Tensor:
    """x / (safety * ||x||_F + eps), x (..., m, n), as a fresh contiguous tensor in ``dtype``."""
    if x.device.type == "cpu" and x.dim() == 2:
        # Two passes less. Only where the sum of squares is in no danger, where a power of two changes no bit; asking
        # costs nothing on a CPU.
        copy = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
        norm = _norm(copy, 2)
        if _SAFE_NORM[0] < float(norm) < _SAFE_NORM[1]:
            return copy.div_(norm.mul_(safety).add_(EPS)).to(dtype)
    scaled, scale = prescaled(x)
    divisor = _norm(scaled, 2).mul_(safety).add_(EPS * scale)
    return scaled.div_(divisor).to(dtype)


def unit_norm(x: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / ||x||_F in ``dtype``, eps / ||x||_F in float32): eps is left for a later norm. Zero stays 0."""
    scaled, scale = prescaled(x)
    norm = _norm(scaled, 2).clamp_min_(_TINY)
    return scaled.div_(norm).to(dtype), EPS * scale / norm


def schatten4_rescale(x: Tensor, gram: Tensor, eps: Tensor, *, safety: float) -> None:
    """Divide x, of Frobenius norm 1, by safety * ||XX'||_F^(1/2) + eps in place, and ``gram`` = XX' to match.

    ||XX'||_F^(1/2) = (sum sigma^4)^(1/4) lies between the largest singular value and the Frobenius norm.
    x: (..., s, l), gram: (..., s, s), eps: (..., 1, 1) from ``unit_norm``.
    """
    norm = _norm(gram, 2).sqrt_().mul_(safety).add_(eps).clamp_min_(_TINY)
    x.div_(norm)
    gram.div_(norm.square_())


def _norm(x: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(x, ord=order, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def _power_of_two(largest: Tensor) -> Tensor:
    # From the exponent's bits: pow() and exp2() need not be exact on every device.
    exponent = largest.view(torch.int32) >> 23
    return ((254 - exponent).clamp_(1, 253) << 23).view(torch.float32)
