"""Rules with a second moment: LASM by elements, Lamb and StableAdamW.

The second buffer holds the root of the second moment, not the moment: the squares of gradients above 1e19
overflow fp32 and those below 1e-23 are lost in it, while the root has the gradient's own size. It is moved
on in fp64, s <- sqrt(b s^2 + (1 - b) x^2), and rounded once. Flat tensors (n,) of one dtype, g never
written, every operation rounded by itself (see ``blend.direction``). On a CPU each function is one compiled
pass over memory (``native/moments.c``); what stands here says what it computes, to the bit, and does it elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_optim.elementwise import passes
from ds_optim.elementwise.blend import check_flat
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import Flat, read_only
from ds_optim.elementwise.native.rules import MomentWeights
from ds_optim.elementwise.steps import decayed


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Both moments' decay rates, eps, and the bias correction of step ``step``, which counts from 1."""

    betas: tuple[float, float]
    eps: float
    step: int

    @property
    def mean_correction(self) -> float:
        return 1 - self.betas[0] ** self.step

    @property
    def root_correction(self) -> float:
        return math.sqrt(1 - self.betas[1] ** self.step)

    @cached_property
    def weights(self) -> MomentWeights:
        """As the kernels take them."""
        return _weights(self.betas, self.eps, self.mean_correction, self.root_correction)


def _weights(betas: tuple[float, float], eps: float = 0.0, mean: float = 1.0, deviation: float = 1.0) -> MomentWeights:
    b1, b2 = betas
    return MomentWeights(beta=b2, rest=1 - b2, eps=eps, k0=b1, k1=1 - b1, mean=mean, deviation=deviation)


def _move_root(root: Tensor, x: Tensor, beta: float, d: Tensor, e: Tensor) -> None:
    """root <- sqrt(beta root^2 + (1 - beta) x^2); d and e are fp64 scratch."""
    d.copy_(root)
    d.mul_(d).mul_(beta)
    e.copy_(x)
    e.mul_(e).mul_(1 - beta)
    root.copy_(d.add_(e).sqrt_())


def lasm_difference(m: Flat, g: Flat, scratch: Scratch) -> Tensor:
    """The sum of (g - m)^2 in fp64. Moves nothing."""

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor, d: Tensor) -> Tensor:
        return _square_sum(torch.sub(gradient, momentum, out=a), d)

    return passes.measure("lasm_difference", (read_only(m), g), (), eager, scratch=scratch, narrow=1, wide=1)


def lasm_element_step(
    p: Flat,
    m: Tensor,
    root: Tensor,
    g: Flat,
    *,
    betas: tuple[float, float],
    lr: float,
    decay: float,
    scale: float,
    scratch: Scratch,
) -> None:
    """v <- b2 v + (1-b2) (g - m)^2; m <- b1 m + (1-b1) g / (1 + sqrt(v)); p <- p (1 - lr decay) - lr scale sign(m)."""
    check_flat(p, m=m, root=root, g=g)

    def eager(
        weights: Tensor, momentum: Tensor, deviation: Tensor, gradient: Tensor, a: Tensor, d: Tensor, e: Tensor
    ) -> None:
        torch.sub(gradient, momentum, out=a)
        _move_root(deviation, a, betas[1], d, e)
        torch.add(deviation, 1, out=a)
        torch.div(gradient, a, out=a).mul_(1 - betas[0])
        momentum.mul_(betas[0]).add_(a)
        decayed(weights, lr, decay).sub_(torch.sign(momentum, out=a), alpha=lr * scale)

    numbers = _weights(betas), lr * scale, 1 - lr * decay
    passes.step("lasm_element_step", (p, m, root, g), numbers, eager, scratch=scratch, narrow=1, wide=2)


def lamb_measure(
    p: Flat, m: Tensor, root: Tensor, g: Flat, moments: Moments, decay: float, scratch: Scratch
) -> list[Tensor]:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2, kept as its root; the sums of p^2 and r^2 in fp64.

    r = m_hat / (sqrt(v_hat) + eps) + decay p.
    """
    check_flat(p, m=m, root=root, g=g)

    def eager(
        weights: Tensor, mean: Tensor, root: Tensor, gradient: Tensor, a: Tensor, b: Tensor, d: Tensor, e: Tensor
    ) -> Tensor:
        _advance(mean, root, gradient, moments, a, d, e)
        update = _lamb_update(weights, mean, root, moments, decay, a, b)
        return torch.stack([_square_sum(weights, d), _square_sum(update, d)])

    tensors, numbers = (read_only(p), m, root, g), (moments.weights, decay)
    sums = passes.measure("lamb_measure", tensors, numbers, eager, scratch=scratch, narrow=2, wide=2, columns=2)
    return list(sums.unbind())


def lamb_step(p: Flat, m: Tensor, root: Tensor, *, moments: Moments, lr: float, decay: float, scratch: Scratch) -> None:
    """p <- p - lr r, r as in :func:`lamb_measure`; lr has the trust ratio in it."""
    check_flat(p, m=m, root=root)

    def eager(weights: Tensor, mean: Tensor, root: Tensor, a: Tensor, b: Tensor) -> None:
        weights.sub_(_lamb_update(weights, mean, root, moments, decay, a, b).mul_(lr))

    passes.step("lamb_step", (p, m, root), (moments.weights, lr, decay), eager, scratch=scratch, narrow=2)


def _lamb_update(p: Tensor, m: Tensor, root: Tensor, moments: Moments, decay: float, a: Tensor, b: Tensor) -> Tensor:
    update = _ratio(m, root, moments, a, b)
    return update.add_(torch.mul(p, decay, out=a)) if decay else update


def stable_measure(m: Tensor, root: Tensor, g: Flat, moments: Moments, scratch: Scratch) -> Tensor:
    """m and v move on as in :func:`lamb_measure`; the sum of g^2 / max(v_hat, eps^2) in fp64."""
    check_flat(m, root=root, g=g)

    def eager(mean: Tensor, root: Tensor, gradient: Tensor, a: Tensor, d: Tensor, e: Tensor) -> Tensor:
        _advance(mean, root, gradient, moments, a, d, e)
        d.copy_(torch.div(root, moments.root_correction, out=a)).clamp_min_(moments.eps)
        e.copy_(gradient)
        return e.div_(d).square_().sum()

    return passes.measure("stable_measure", (m, root, g), [moments.weights], eager, scratch=scratch, narrow=1, wide=2)


def stable_step(
    p: Flat, m: Tensor, root: Tensor, *, moments: Moments, lr: float, decay: float, scratch: Scratch
) -> None:
    """p <- p (1 - lr decay) - lr m_hat / (sqrt(v_hat) + eps)."""
    check_flat(p, m=m, root=root)

    def eager(weights: Tensor, mean: Tensor, root: Tensor, a: Tensor, b: Tensor) -> None:
        decayed(weights, lr, decay).sub_(_ratio(mean, root, moments, a, b).mul_(lr))

    numbers = moments.weights, lr, 1 - lr * decay
    passes.step("stable_step", (p, m, root), numbers, eager, scratch=scratch, narrow=2)


def _advance(m: Tensor, root: Tensor, g: Tensor, moments: Moments, a: Tensor, d: Tensor, e: Tensor) -> None:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2, kept as its root; a, d and e are spent."""
    torch.mul(g, 1 - moments.betas[0], out=a)
    m.mul_(moments.betas[0]).add_(a)
    _move_root(root, g, moments.betas[1], d, e)


def _ratio(mean: Tensor, root: Tensor, moments: Moments, a: Tensor, b: Tensor) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps), in b; a is spent."""
    torch.div(root, moments.root_correction, out=a).add_(moments.eps)
    return torch.div(mean, moments.mean_correction, out=b).div_(a)


def _square_sum(values: Tensor, d: Tensor) -> Tensor:
    """In fp64; d is spent."""
    d.copy_(values)
    return d.mul_(d).sum()
