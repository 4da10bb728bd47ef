"""Steps of flat tensors, in place: sign rules, AdamW, and the application of an update made elsewhere.

All are decoupled: p <- p * (1 - lr * decay) first, then the update. Scalars are computed in Python's
float64 and rounded once to p's dtype. Every operation rounds once (see ``blend.advance``), so an element's
bits depend on its values alone: not on its offset, on chunk borders or on the tensor's length. Where p is stored
in fewer bits all this is done in fp32, and the new p is rounded without bias. Finite gradients are the caller's job.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_optim.elementwise import fused, native
from ds_optim.elementwise.blend import Blend, advance, check_flat
from ds_optim.elementwise.chunks import Scratch, chunks
from ds_optim.elementwise.momentum import Flat, read_only


def sign_step(
    p: Flat,
    m: Flat | None,
    g: Flat,
    *,
    blend: Blend,
    lr: float,
    decay: float,
    scale: float = 1.0,
    scratch: Scratch | None = None,
) -> None:
    """p <- p (1 - lr decay) - lr scale sign(direction), sign(0) = 0; m moves on; g is not written. All (n,).

    Reads p, m, g and writes p, m once.
    """
    check_flat(p, m=m, g=g)
    numbers = (*blend.direction, *blend.momentum), lr * scale, 1 - lr * decay
    if native.sign_step(p, m, g, *numbers) or fused.step("sign_step", (p, m, g), numbers):
        return
    with torch.no_grad(), (scratch or Scratch()).lend(p, 2) as buffers:
        for weights, momentum, gradient, a, b in chunks(p, m, g, buffers=buffers):
            direction = advance(momentum, gradient, blend, a, b)
            # lr times -1, 0 or 1 is exact, so a fused multiply-subtract has the same bits as two operations.
            decayed(weights, lr, decay).sub_(direction.sign_(), alpha=lr * scale)


def adamw_step(
    p: Flat,
    m: Tensor,
    v: Tensor,
    g: Flat,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: int,
    scratch: Scratch | None = None,
) -> None:
    """AdamW (1711.05101) with the bias correction of ``torch.optim.AdamW``; all (n,), g is not written.

    step counts from 1. p <- p (1 - lr decay); m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g g;
    p <- p - [lr / (1-b1^t)] m / (sqrt(v) / sqrt(1-b2^t) + eps). Reads p, m, v, g and writes p, m, v once.
    """
    check_flat(p, m=m, v=v, g=g)
    numbers = adamw_numbers(lr=lr, betas=betas, eps=eps, decay=decay, step=step)
    correction, rate = numbers[5:7]
    if native.adamw_step(p, m, v, g, numbers) or fused.step("adamw_step", (p, m, v, g), [numbers]):
        return
    with torch.no_grad(), (scratch or Scratch()).lend(p, 2) as buffers:
        for weights, mean, square, gradient, a, b in chunks(p, m, v, g, buffers=buffers):
            torch.mul(gradient, 1 - betas[0], out=a)
            mean.mul_(betas[0]).add_(a)
            torch.mul(gradient, gradient, out=a)
            square.mul_(betas[1]).add_(a.mul_(1 - betas[1]))
            _root_into(a, square).div_(correction).add_(eps)
            torch.div(mean, a, out=b).mul_(rate)
            decayed(weights, lr, decay).sub_(b)


def adamw_numbers(*, lr: float, betas: tuple[float, float], eps: float, decay: float, step: int) -> native.AdamW:
    """What the kernels of :func:`adamw_step` ask for."""
    if step < 1:
        raise ValueError(f"adamw_step counts steps from 1, not {step}")
    rate = lr / (1 - betas[0] ** step)
    correction = math.sqrt(1 - betas[1] ** step)
    return betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, correction, rate, 1 - lr * decay


def apply_update(
    p: Flat, update: Flat, *, lr: float, decay: float, scale: float = 1.0, scratch: Scratch | None = None
) -> None:
    """p <- p (1 - lr decay) - lr scale update; update (n,) of any float dtype, on any device, is not written.

    A bfloat16 update is brought to p's dtype first; lr times scale is rounded to p's dtype once.
    """
    check_flat(p, update=update)
    numbers = lr * scale, 1 - lr * decay
    if native.apply_update(p, update, *numbers) or fused.step("apply_update", (p, read_only(update)), numbers):
        return
    with torch.no_grad(), (scratch or Scratch()).lend(p, 1) as buffers:
        for weights, change, a in chunks(p, read_only(update), buffers=buffers):
            a.copy_(change).mul_(lr * scale)
            decayed(weights, lr, decay).sub_(a)


def copy_into(out: Tensor, values: Tensor) -> None:
    """out <- values, (n,) of float dtypes on one device, rounded to the nearest."""
    if not fused.step("copy_into", (out, values), ()):
        out.copy_(values)


def _root_into(out: Tensor, values: Tensor) -> Tensor:
    """The nearest value to the root. A CPU's vector library may be a last bit off in fp32, by way of fp64 it is not."""
    return out.copy_(values.double().sqrt()) if values.device.type == "cpu" else torch.sqrt(values, out=out)


def decayed(p: Tensor, lr: float, decay: float) -> Tensor:
    """p, after p <- p (1 - lr decay); untouched where the factor is 1."""
    factor = 1 - lr * decay
    return p if factor == 1 else p.mul_(factor)
