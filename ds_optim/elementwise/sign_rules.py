"""Steps of the sign rules that ask something of each element, or of a whole parameter, before they move it.

Each rule that asks for a sum, a maximum or a minimum over the parameter has two functions: one reads (and
where it must, moves momentum on) and answers with a number in fp64, one steps. Flat tensors (n,) of one
dtype, g never written, every operation rounded by itself (see ``blend.direction``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend, advance, check_flat, direction, move_on
from ds_optim.elementwise.chunks import Scratch, chunks
from ds_optim.elementwise.momentum import Flat, read_only
from ds_optim.elementwise.noise import uniform_noise
from ds_optim.elementwise.steps import decayed


def agreement(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """How many elements' gradients point where the direction does: u g > 0, u = sign(direction). Moves nothing."""
    a, b = scratch.take(2, g)
    count = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, x, y in chunks(g, read_only(m), buffers=[a, b]):
            _mask_agreeing(direction(momentum, gradient, blend, x, y).sign_(), gradient, y)
            count += y.sum(dtype=torch.float64)
    return count


def cautious_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, scale: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr scale u [u g > 0], u = sign(direction); m moves on."""
    check_flat(p, m=m, g=g)
    buffers = scratch.take(2, p)
    with torch.no_grad():
        for weights, momentum, gradient, a, b in chunks(p, m, g, buffers=buffers):
            direction(momentum, gradient, blend, a, b).sign_()
            a.mul_(_mask_agreeing(a, gradient, b))
            decayed(weights, lr, decay).sub_(a, alpha=lr * scale)
            move_on(momentum, gradient, blend, b)


def _mask_agreeing(u: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """1 where u g > 0, else 0, in ``out``: u is -1, 0 or 1, so the product is exact."""
    return torch.mul(u, g, out=out).gt_(0)


def smallest_nonzero(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """The smallest |direction| that is not 0; infinity where all are. Moves nothing."""
    a, b = scratch.take(2, g)
    least = torch.full((), float("inf"), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, x, y in chunks(g, read_only(m), buffers=[a, b]):
            size = direction(momentum, gradient, blend, x, y).abs_()
            least = torch.minimum(least, size.masked_fill_(size == 0, float("inf")).min().double())
    return least


def count_from(m: Flat, g: Flat, blend: Blend, nu: float, scratch: Scratch) -> Tensor:
    """How many elements have |direction| >= nu. Moves nothing."""
    a, b = scratch.take(2, g)
    count = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, x, y in chunks(g, read_only(m), buffers=[a, b]):
            count += direction(momentum, gradient, blend, x, y).abs_().ge_(nu).sum(dtype=torch.float64)
    return count


def gated_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, nu: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr h(c), c the direction: h = sign where |c| >= nu, c itself below; m moves on."""
    check_flat(p, m=m, g=g)
    buffers = scratch.take(2, p)
    with torch.no_grad():
        for weights, momentum, gradient, a, b in chunks(p, m, g, buffers=buffers):
            direction(momentum, gradient, blend, a, b)
            below = torch.abs(a, out=b).lt_(nu)
            # One of the two terms is 0, so their sum is exact: sign(c) [|c| >= nu] + c [|c| < nu].
            small = a * below
            a.sign_().mul_(below.neg_().add_(1)).add_(small)
            decayed(weights, lr, decay).sub_(a.mul_(lr))
            move_on(momentum, gradient, blend, b)


def raw_step(p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, scratch: Scratch) -> None:
    """p <- p (1 - lr decay) - lr direction; m moves on."""
    check_flat(p, m=m, g=g)
    buffers = scratch.take(2, p)
    with torch.no_grad():
        for weights, momentum, gradient, a, b in chunks(p, m, g, buffers=buffers):
            advance(momentum, gradient, blend, a, b)
            decayed(weights, lr, decay).sub_(a.mul_(lr))


def move_momentum(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """m moves on; the largest |m| of the new ones, 0 for none."""
    (b,) = scratch.take(1, g)
    largest = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for momentum, gradient, x in chunks(m, g, buffers=[b]):
            move_on(momentum, gradient, blend, x)
            largest = torch.maximum(largest, torch.abs(momentum, out=x).max().double())
    return largest


def raise_bounds(bounds: Tensor, m: Flat, scratch: Scratch) -> None:
    """bounds <- max(bounds, |m|), element by element."""
    with torch.no_grad():
        for limit, momentum, a in chunks(bounds, read_only(m), buffers=scratch.take(1, bounds)):
            torch.maximum(limit, torch.abs(momentum, out=a), out=limit)


def stochastic_sign_step(
    p: Flat,
    m: Flat,
    bound: Tensor | float,
    *,
    lr: float,
    decay: float,
    seed: int,
    stream: int,
    step: int,
    start: int,
    scratch: Scratch,
) -> None:
    """p <- p (1 - lr decay) - lr sign(m + B n), n uniform in [-1, 1] for each element, m already moved on.

    bound: B, one number or (n,); where it is 0, so is m, and nothing moves. start: the place of the first
    element in its parameter, which n is a function of (see ``noise.uniform_noise``).
    """
    check_flat(p, m=m)
    buffers = scratch.take(1, p)
    bounds = bound if isinstance(bound, Tensor) else None
    with torch.no_grad():
        position = start
        for weights, momentum, limit, noise in chunks(p, read_only(m), bounds, buffers=buffers):
            if not native.uniform_noise(noise, seed=seed, stream=stream, step=step, start=position):
                uniform_noise(noise, seed=seed, stream=stream, step=step, start=position)
            noise.mul_(bound if limit is None else limit).add_(momentum)
            decayed(weights, lr, decay).sub_(noise.sign_(), alpha=lr)
            position += weights.numel()
