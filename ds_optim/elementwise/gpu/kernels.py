"""The steps: each program reads its tile once, computes in fp32, and writes it once. ``tiles`` says what pointers mean.

Every operation is rounded by itself, in the order of the eager path; a launch must forbid to contract two into one.
A step's formula is compiled twice into one kernel, the two turns of its loop: without masks for tiles that lie whole in
the slice, and with them. A program takes one of the turns.
What differs from call to call is typed and never a constant to the compiler, so that dtypes alone compile it anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ds_optim.elementwise.gpu import tiles
from ds_optim.elementwise.gpu.tiles import BLOCK, LANES


def _kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled for the types of its arguments alone, not for their values or alignment."""
    return triton.jit(function, do_not_specialize=list(inspect.signature(function).parameters))


@triton.jit
def _tile(n: tl.tensor, head: tl.tensor, aligned: tl.tensor) -> tl.tensor:
    """Where this program's tile begins in the slice, its first block, and the turn for it: 1 where it needs masks."""
    block = tl.program_id(0).to(tl.int64)
    base = block * BLOCK - head
    whole = (aligned != 0) & (base >= 0) & (base + BLOCK <= n)
    return base, block, 1 - whole.to(tl.int32)


@triton.jit
def _at(values: tl.tensor, place: tl.tensor) -> tl.tensor:
    if values is None:
        return None
    else:
        return values + place


@_kernel
def sign_step(
    p: tl.tensor,
    m: tl.tensor,
    scale: tl.tensor,
    g: tl.tensor,
    d0: tl.float32,
    d1: tl.float32,
    k0: tl.float32,
    k1: tl.float32,
    lr: tl.float32,
    factor: tl.float32,
    key: tl.int64,
    step_p: tl.int64,
    step_m: tl.int64,
    counter: tl.int64,
    n: tl.int64,
    head: tl.int64,
    aligned: tl.int32,
) -> None:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g. Without m: the sign of d1 g."""
    base, block, turn = _tile(n, head, aligned)
    counter += block * LANES
    p, m, g, scale = p + base, _at(m, base), g + base, _at(scale, block)
    for masked in tl.static_range(2):
        if turn == masked:
            mask = tiles.inside(base, n, masked)
            weights = tiles.load(p, None, mask)
            gradient = tiles.load(g, None, mask)
            direction = gradient * d1
            if m is not None:
                momentum = tiles.load(m, scale, mask)
                direction = direction + momentum * d0
                tiles.store(m, scale, momentum * k0 + gradient * k1, mask, key, step_m, counter)
            weights = weights * factor - tiles.signed(lr, direction)
            tiles.store(p, None, weights, mask, key, step_p, counter)


@_kernel
def blend_into(
    out: tl.tensor,
    m: tl.tensor,
    scale: tl.tensor,
    g: tl.tensor,
    d0: tl.float32,
    d1: tl.float32,
    k0: tl.float32,
    k1: tl.float32,
    key: tl.int64,
    step: tl.int64,
    counter: tl.int64,
    n: tl.int64,
    head: tl.int64,
    aligned: tl.int32,
) -> None:
    """out <- d0 m + d1 g, rounded to the nearest; m <- k0 m + k1 g. Without m: d1 g."""
    base, block, turn = _tile(n, head, aligned)
    counter += block * LANES
    out, m, g, scale = out + base, _at(m, base), g + base, _at(scale, block)
    for masked in tl.static_range(2):
        if turn == masked:
            mask = tiles.inside(base, n, masked)
            gradient = tiles.load(g, None, mask)
            direction = gradient * d1
            if m is not None:
                momentum = tiles.load(m, scale, mask)
                direction = direction + momentum * d0
                tiles.store(m, scale, momentum * k0 + gradient * k1, mask, key, step, counter)
            tiles.store_nearest(out, direction, mask)


@_kernel
def apply_update(
    p: tl.tensor,
    update: tl.tensor,
    scale: tl.tensor,
    rate: tl.float32,
    factor: tl.float32,
    key: tl.int64,
    step: tl.int64,
    counter: tl.int64,
    n: tl.int64,
    head: tl.int64,
    aligned: tl.int32,
) -> None:
    """p <- factor p - rate update."""
    base, block, turn = _tile(n, head, aligned)
    counter += block * LANES
    p, update, scale = p + base, update + base, _at(scale, block)
    for masked in tl.static_range(2):
        if turn == masked:
            mask = tiles.inside(base, n, masked)
            weights = tiles.load(p, None, mask)
            change = tiles.load(update, scale, mask)
            tiles.store(p, None, weights * factor - change * rate, mask, key, step, counter)


@_kernel
def adamw_step(
    p: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta1: tl.float32,
    rest1: tl.float32,
    beta2: tl.float32,
    rest2: tl.float32,
    eps: tl.float32,
    correction: tl.float32,
    rate: tl.float32,
    factor: tl.float32,
    key: tl.int64,
    step: tl.int64,
    counter: tl.int64,
    n: tl.int64,
    head: tl.int64,
    aligned: tl.int32,
) -> None:
    """m <- beta1 m + rest1 g; v <- beta2 v + rest2 g g; p <- factor p - rate m / (sqrt(v) / correction + eps).

    Root and quotients are rounded correctly. Torch's are so on no device: a CPU's root may come from a vector library,
    and a GPU multiplies by the reciprocal of the correction. Both may be a last bit off.
    """
    base, block, turn = _tile(n, head, aligned)
    counter += block * LANES
    p, m, v, g = p + base, m + base, v + base, g + base
    for masked in tl.static_range(2):
        if turn == masked:
            mask = tiles.inside(base, n, masked)
            weights = tiles.load(p, None, mask)
            gradient = tiles.load(g, None, mask)
            mean = tiles.load(m, None, mask) * beta1 + gradient * rest1
            square = tiles.load(v, None, mask) * beta2 + gradient * gradient * rest2
            tiles.store_nearest(m, mean, mask)
            tiles.store_nearest(v, square, mask)
            change = tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), correction) + eps) * rate
            tiles.store(p, None, weights * factor - change, mask, key, step, counter)
