"""Steps of the sign rules that ask something of each element, or of a whole parameter, before they move it.

Each rule that asks for a sum, a maximum or a minimum over the parameter has two functions: one reads (and
where it must, moves momentum on) and answers with a number in fp64, one steps. Flat tensors (n,) of one
dtype, g never written, every operation rounded by itself (see ``blend.direction``). On a CPU each is one compiled
pass over memory (``native.rules``); what stands here says what it computes, to the bit, and does it elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.elementwise.blend import Blend, advance, check_flat, direction, move_on
from ds_optim.elementwise.chunks import Scratch, spans
from ds_optim.elementwise.momentum import Flat, read_only
from ds_optim.elementwise.native import rules as native
from ds_optim.elementwise.noise import uniform_noise
from ds_optim.elementwise.steps import decayed


def agreement(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """How many elements' gradients point where the direction does: u g > 0, u = sign(direction). Moves nothing."""
    count = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, a, b in spans(g, read_only(m), scratch=scratch, narrow=2):
            found = native.agreement(momentum, gradient, blend.weights)
            if found is None:
                _mask_agreeing(direction(momentum, gradient, blend, a, b).sign_(), gradient, b)
                found = b.sum(dtype=torch.float64)
            count += found
    return count


def cautious_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, scale: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr scale u [u g > 0], u = sign(direction); m moves on."""
    check_flat(p, m=m, g=g)
    with torch.no_grad():
        for weights, momentum, gradient, a, b in spans(p, m, g, scratch=scratch, narrow=2):
            if native.cautious_step(weights, momentum, gradient, blend.weights, lr * scale, 1 - lr * decay):
                continue
            direction(momentum, gradient, blend, a, b).sign_()
            a.mul_(_mask_agreeing(a, gradient, b))
            decayed(weights, lr, decay).sub_(a, alpha=lr * scale)
            move_on(momentum, gradient, blend, b)


def _mask_agreeing(u: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """1 where u g > 0, else 0, in ``out``: u is -1, 0 or 1, so the product is exact."""
    return torch.mul(u, g, out=out).gt_(0)


def smallest_nonzero(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """The smallest |direction| that is not 0; infinity where all are. Moves nothing."""
    least = torch.full((), float("inf"), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, a, b in spans(g, read_only(m), scratch=scratch, narrow=2):
            found = native.smallest_nonzero(momentum, gradient, blend.weights)
            if found is None:
                size = direction(momentum, gradient, blend, a, b).abs_()
                found = size.masked_fill_(size == 0, float("inf")).min().double()
            least = torch.minimum(least, found)
    return least


def count_from(m: Flat, g: Flat, blend: Blend, nu: float, scratch: Scratch) -> Tensor:
    """How many elements have |direction| >= nu. Moves nothing."""
    count = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for gradient, momentum, a, b in spans(g, read_only(m), scratch=scratch, narrow=2):
            found = native.count_from(momentum, gradient, blend.weights, nu)
            if found is None:
                found = direction(momentum, gradient, blend, a, b).abs_().ge_(nu).sum(dtype=torch.float64)
            count += found
    return count


def gated_step(
    p: Flat, m: Flat, g: Flat, *, blend: Blend, lr: float, decay: float, nu: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr h(c), c the direction: h = sign where |c| >= nu, c itself below; m moves on."""
    check_flat(p, m=m, g=g)
    with torch.no_grad():
        for weights, momentum, gradient, a, b in spans(p, m, g, scratch=scratch, narrow=2):
            if native.gated_step(weights, momentum, gradient, blend.weights, lr, 1 - lr * decay, nu):
                continue
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
    with torch.no_grad():
        for weights, momentum, gradient, a, b in spans(p, m, g, scratch=scratch, narrow=2):
            if native.raw_step(weights, momentum, gradient, blend.weights, lr, 1 - lr * decay):
                continue
            advance(momentum, gradient, blend, a, b)
            decayed(weights, lr, decay).sub_(a.mul_(lr))


def move_momentum(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """m moves on; the largest |m| of the new ones, 0 for none."""
    largest = torch.zeros((), dtype=torch.float64, device=g.device)
    with torch.no_grad():
        for momentum, gradient, a in spans(m, g, scratch=scratch, narrow=1):
            found = native.move_momentum(momentum, gradient, blend.weights)
            if found is None:
                move_on(momentum, gradient, blend, a)
                found = torch.abs(momentum, out=a).max().double()
            largest = torch.maximum(largest, found)
    return largest


def stochastic_sign_step(
    p: Flat,
    m: Flat,
    bound: float,
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

    bound: B; where it is 0, so is m, and nothing moves. start: the place of the first element in its parameter,
    which n is a function of (see ``noise.uniform_noise``).
    """
    check_flat(p, m=m)
    key = {"seed": seed, "stream": stream, "step": step}
    with torch.no_grad():
        for weights, momentum, a in spans(p, read_only(m), scratch=scratch, narrow=1):
            if not native.stochastic_sign_step(weights, momentum, bound, lr, 1 - lr * decay, start=start, **key):
                uniform_noise(a, start=start, **key).mul_(bound).add_(momentum)
                decayed(weights, lr, decay).sub_(a.sign_(), alpha=lr)
            start += weights.numel()


def stochastic_element_step(
    p: Flat,
    m: Flat,
    bounds: Tensor,
    g: Flat,
    *,
    blend: Blend,
    lr: float,
    decay: float,
    seed: int,
    stream: int,
    step: int,
    start: int,
    scratch: Scratch,
) -> None:
    """m moves on; B <- max(B, |m|), element by element; the step of :func:`stochastic_sign_step`. bounds: B, (n,)."""
    check_flat(p, m=m, bounds=bounds, g=g)
    with torch.no_grad():
        for weights, momentum, limit, gradient, a in spans(p, m, bounds, g, scratch=scratch, narrow=1):
            rates = lr, 1 - lr * decay
            done = native.stochastic_element_step(
                weights,
                momentum,
                limit,
                gradient,
                blend.weights,
                *rates,
                seed=seed,
                stream=stream,
                step=step,
                start=start,
            )
            if not done:
                move_on(momentum, gradient, blend, a)
                torch.maximum(limit, torch.abs(momentum, out=a), out=limit)
                uniform_noise(a, seed=seed, stream=stream, step=step, start=start).mul_(limit).add_(momentum)
                decayed(weights, lr, decay).sub_(a.sign_(), alpha=lr)
            start += weights.numel()
