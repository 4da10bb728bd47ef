"""The linear family: direction and next momentum are both blends of momentum and gradient.

Lion, Signum, SignSGD, Muon (with and without nesterov), LionMuon, SignMuon: each is four numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optim.elementwise import fused, native, passes
from ds_optim.elementwise.chunks import Scratch, chunks
from ds_optim.elementwise.momentum import Flat, read_only


@dataclass(frozen=True)
class Blend:
    """direction[0] * m + direction[1] * g is the direction; m <- momentum[0] * m + momentum[1] * g."""

    direction: tuple[float, float]
    momentum: tuple[float, float]

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """All four, the direction's first."""
        return *self.direction, *self.momentum


def blend_into(out: Tensor, m: Flat | None, g: Flat, blend: Blend, scratch: Scratch | None = None) -> None:
    """Write the direction to ``out`` and move ``m`` on, in one pass over memory; g is never written.

    out: (n,) of any float dtype, on any device; it may be g itself where the caller owns g. m: (n,) in g's
    dtype and device, or stored in fewer bits, or None for rules without momentum: the direction is then
    direction[1] * g. Roundings: see ``direction``, and one more where ``out`` has another dtype.
    """
    check_flat(g, out=out, m=m)
    if native.blend_into(out, m, g, blend.weights) or fused.step("blend_into", (out, m, g), [blend.weights]):
        return
    with torch.no_grad(), (scratch or Scratch()).lend(g, 2) as buffers:
        for gradient, momentum, result, a, b in chunks(g, m, out, buffers=buffers):
            result.copy_(advance(momentum, gradient, blend, a, b))


def direction_into(out: Tensor, m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> None:
    """Write the direction to ``out``, (n,) of any float dtype and device; nothing moves."""
    check_flat(g, out=out, m=m)
    if fused.step("direction_into", (out, read_only(m), g), [blend.weights]):
        return
    with torch.no_grad(), scratch.lend(g, 2) as buffers:
        for gradient, momentum, result, a, b in chunks(g, read_only(m), out, buffers=buffers):
            result.copy_(direction(momentum, gradient, blend, a, b))


def direction_squares(m: Flat, g: Flat, blend: Blend, scratch: Scratch) -> Tensor:
    """The sum of squares of the direction in fp64; nothing moves."""
    check_flat(g, m=m)

    def eager(momentum: Tensor, gradient: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        d.copy_(direction(momentum, gradient, blend, a, b))
        return d.mul_(d).sum()

    tensors = read_only(m), g
    return passes.measure("direction_squares", tensors, [blend.weights], eager, scratch=scratch, narrow=2, wide=1)


def advance(m: Tensor | None, g: Tensor, blend: Blend, a: Tensor, b: Tensor) -> Tensor:
    """The direction of one chunk, in a; m has moved on, b is spent, g is as it was. All of one length and dtype."""
    direction(m, g, blend, a, b)
    if m is not None and blend.momentum == blend.direction:
        m.copy_(a)
    elif m is not None:
        move_on(m, g, blend, b)
    return a


def direction(m: Tensor | None, g: Tensor, blend: Blend, a: Tensor, b: Tensor) -> Tensor:
    """The direction of one chunk, in a; b is spent, m and g are as they were. All of one length and dtype.

    Each product and each sum is rounded by itself: rounded(rounded(d0 m) + rounded(d1 g)), the momentum
    likewise, scalars rounded to m's dtype first. Operations that round once for two (add with alpha, lerp,
    addcmul) are kept out: kernels may fuse them in the vectorized body of a tensor and not in its tail, and
    then the bits of an element would depend on where in the partition it lies.
    """
    torch.mul(g, blend.direction[1], out=a)
    if m is not None:
        torch.mul(m, blend.direction[0], out=b)
        a.add_(b)
    return a


def move_on(m: Tensor, g: Tensor, blend: Blend, b: Tensor) -> Tensor:
    """The next momentum of one chunk, in m; b is spent. The bits of the direction where the weights are the same."""
    torch.mul(g, blend.momentum[1], out=b)
    return m.mul_(blend.momentum[0]).add_(b)


def check_flat(like: Flat, **others: Flat | None) -> None:
    """Raise ValueError unless ``like`` and all others are one-dimensional and of one length."""
    numel = like.numel()
    for name, tensor in {"": like, **others}.items():
        if tensor is not None and (tensor.dim() != 1 or tensor.numel() != numel):
            raise ValueError(f"flat tensors of one length expected: {name} {tuple(tensor.shape)}, {tuple(like.shape)}")
