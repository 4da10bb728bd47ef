"""Steps of the sign rules that ask something of each element, or of a whole parameter, before they move it.

Each rule that asks for a sum, a maximum or a minimum over the parameter has two functions: one reads (and
where it must, moves momentum on) and answers with a number in fp64, one steps. Flat tensors (n,) of one
dtype, g never written, every operation rounded by itself (see ``blend.direction``). On a CPU each is one compiled
pass over memory (``native/rules.c``); what stands here says what it computes, to the bit, and does it elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.elementwise import fused, passes
from ds_optim.elementwise.blend import Blend, advance, check_flat, direction, move_on
from ds_optim.elementwise.chunks import Scratch, spans
from ds_optim.elementwise.momentum import Flat, read_only
from ds_optim.elementwise.native import rules as native
from ds_optim.elementwise.noise import NoiseKey, uniform_noise
from ds_optim.elementwise.steps import decayed


def agreement(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """How many elements' gradients point where the direction does: u g > 0, u = sign(direction). Moves nothing."""

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> Tensor:
        _mask_agreeing(direction(momentum, gradient, blend, a, b).sign_(), gradient, b)
        return b.sum(dtype=torch.float64)

    return passes.measure("agreement", (read_only(m), g), [blend.weights], eager, scratch=scratch, narrow=2)


def cautious_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, scale: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr scale u [u g > 0], u = sign(direction); m moves on."""
    check_flat(p, m=m, g=g)

    def eager(weights: Tensor, momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        direction(momentum, gradient, blend, a, b).sign_()
        a.mul_(_mask_agreeing(a, gradient, b))
        decayed(weights, lr, decay).sub_(a, alpha=lr * scale)
        move_on(momentum, gradient, blend, b)

    numbers = blend.weights, lr * scale, 1 - lr * decay
    passes.step("cautious_step", (p, m, g), numbers, eager, scratch=scratch, narrow=2)


def _mask_agreeing(u: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """1 where u g > 0, else 0, in ``out``: u is -1, 0 or 1, so the product is exact."""
    return torch.mul(u, g, out=out).gt_(0)


def smallest_nonzero(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """The smallest |direction| that is not 0; infinity where all are, NaN where one is. Moves nothing."""

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> Tensor:
        size = direction(momentum, gradient, blend, a, b).abs_()
        return size.masked_fill_(size == 0, float("inf")).min().double()

    tensors = read_only(m), g
    return passes.measure("smallest_nonzero", tensors, [blend.weights], eager, scratch=scratch, narrow=2, join="min")


def count_from(m: Flat, g: Flat, blend: Blend, nu: float, scratch: Scratch) -> Tensor:
    """How many elements have |direction| >= nu. Moves nothing."""

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return direction(momentum, gradient, blend, a, b).abs_().ge_(nu).sum(dtype=torch.float64)

    return passes.measure("count_from", (read_only(m), g), [blend.weights, nu], eager, scratch=scratch, narrow=2)


def gated_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, nu: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr h(c), c the direction: h = sign where |c| >= nu, c itself below; m moves on."""
    check_flat(p, m=m, g=g)

    def eager(weights: Tensor, momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        direction(momentum, gradient, blend, a, b)
        below = torch.abs(a, out=b).lt_(nu)
        # One of the two terms is 0, so their sum is exact: sign(c) [|c| >= nu] + c [|c| < nu].
        small = a * below
        a.sign_().mul_(below.neg_().add_(1)).add_(small)
        decayed(weights, lr, decay).sub_(a.mul_(lr))
        move_on(momentum, gradient, blend, b)

    numbers = blend.weights, lr, 1 - lr * decay, nu
    passes.step("gated_step", (p, m, g), numbers, eager, scratch=scratch, narrow=2)


def raw_step(p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, scratch: Scratch) -> None:
    """p <- p (1 - lr decay) - lr direction; m moves on."""
    check_flat(p, m=m, g=g)

    def eager(weights: Tensor, momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        advance(momentum, gradient, blend, a, b)
        decayed(weights, lr, decay).sub_(a.mul_(lr))

    passes.step("raw_step", (p, m, g), (blend.weights, lr, 1 - lr * decay), eager, scratch=scratch, narrow=2)


def move_momentum(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """m moves on; the largest |m| of the new ones, 0 for none, NaN where one is."""

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor) -> Tensor:
        return torch.abs(move_on(momentum, gradient, blend, a), out=a).max().double()

    return passes.measure("move_momentum", (m, g), [blend.weights], eager, scratch=scratch, narrow=1, join="max")


def stochastic_sign_step(
    p: Flat, m: Flat, bound: float, *, lr: float, decay: float, noise: NoiseKey, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr sign(m + B n), n uniform in [-1, 1] for each element, m already moved on.

    bound: B; where it is 0, so is m, and nothing moves. noise: what n is a function of (``noise.uniform_noise``).
    """
    check_flat(p, m=m)
    if fused.step("stochastic_sign_step", (p, read_only(m)), (bound, lr, 1 - lr * decay, noise)):
        return
    with torch.no_grad():
        for weights, momentum, a in spans(p, read_only(m), scratch=scratch, narrow=1):
            if not native.step("stochastic_sign_step", (weights, momentum), (bound, lr, 1 - lr * decay, noise)):
                uniform_noise(a, noise).mul_(bound).add_(momentum)
                decayed(weights, lr, decay).sub_(a.sign_(), alpha=lr)
            noise = noise.at(weights.numel())


def stochastic_element_step(
    p: Flat,
    m: Flat,
    bounds: Tensor,
    g: Flat,
    *,
    blend: Blend,
    lr: float,
    decay: float,
    noise: NoiseKey,
    scratch: Scratch,
) -> None:
    """m moves on; B <- max(B, |m|), element by element; the step of :func:`stochastic_sign_step`. bounds: B, (n,)."""
    check_flat(p, m=m, bounds=bounds, g=g)
    if fused.step("stochastic_element_step", (p, m, bounds, g), (blend.weights, lr, 1 - lr * decay, noise)):
        return
    with torch.no_grad():
        for weights, momentum, limit, gradient, a in spans(p, m, bounds, g, scratch=scratch, narrow=1):
            numbers = blend.weights, lr, 1 - lr * decay, noise
            if not native.step("stochastic_element_step", (weights, momentum, limit, gradient), numbers):
                move_on(momentum, gradient, blend, a)
                torch.maximum(limit, torch.abs(momentum, out=a), out=limit)
                uniform_noise(a, noise).mul_(limit).add_(momentum)
                decayed(weights, lr, decay).sub_(a.sign_(), alpha=lr)
            noise = noise.at(weights.numel())
