"""What each rule makes of a tile, in fp32: its formula, and what it reads and writes. ``kernels`` does the rest.

Every operation is rounded by itself, in the order of the eager path (``steps``, ``blend``, ``sign_rules``,
``moments``); a launch must forbid to contract two into one. A formula gets the tiles of p, m, v and g (None where
there is none), noise, and the slice's numbers in fp32 (w) and in fp64 (d). It answers with the new p, m and v, and
what it measures of each element in up to two columns: 0.0 for what is not written or measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from triton.language import tensor as Tile
from triton.language import tuple as Numbers


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A formula and its tensors, in the order in which callers give them: a letter each of p, m, v and g.

    writes: those that are. casts: those of any float dtype, rounded to the nearest where written; g may be int8, too.
    noisy: takes uniform noise for each element. columns: numbers that are measured, joined by ``join``.
    cautious: what the step did not turn away from zero is decayed, by the last of the numbers.
    """

    name: str
    formula: Any
    tensors: str
    writes: str
    casts: str
    noisy: bool
    columns: int
    join: str
    cautious: bool = False


RULES: dict[str, Rule] = {}
CAUTIOUS = "cautious "
"""Before the name of a rule that steps weights: the same with cautious decay."""


def _rule(
    tensors: str,
    *,
    writes: str = "",
    casts: str = "",
    noisy: bool = False,
    columns: int = 0,
    join: str = "sum",
    weights: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Any:
        made = triton.jit(function)
        RULES[function.__name__] = Rule(
            name=function.__name__, formula=made, tensors=tensors, writes=writes, casts=casts, noisy=noisy,
            columns=columns, join=join,
        )  # fmt: skip
        if weights:
            name = CAUTIOUS + function.__name__
            RULES[name] = replace(RULES[function.__name__], name=name, cautious=True)
        return made

    return register


@triton.jit
def _signed(size: tl.tensor, x: tl.tensor) -> tl.tensor:
    """size sign(x), 0 where x is no number."""
    return tl.where(x > 0, size, tl.where(x < 0, -size, 0.0))


@triton.jit
def _direction(m: tl.tensor, g: tl.tensor, w: tl.tuple) -> tl.tensor:
    return g * w[1] + m * w[0]


@triton.jit
def _next(m: tl.tensor, g: tl.tensor, w: tl.tuple) -> tl.tensor:
    return m * w[2] + g * w[3]


@triton.jit
def _next_root(root: tl.tensor, x: tl.tensor, d: tl.tuple) -> tl.tensor:
    """sqrt(beta root^2 + rest x^2), in fp64 and rounded once."""
    a, b = root.to(tl.float64), x.to(tl.float64)
    return tl.sqrt(a * a * d[0] + b * b * d[1]).to(tl.float32)


@triton.jit
def _ratio(m: tl.tensor, root: tl.tensor, w: tl.tuple) -> tl.tensor:
    """m_hat / (sqrt(v_hat) + eps)."""
    return tl.div_rn(tl.div_rn(m, w[5]), tl.div_rn(root, w[6]) + w[2])


@triton.jit
def _lamb_update(p: tl.tensor, m: tl.tensor, root: tl.tensor, w: tl.tuple, decay: tl.tensor) -> tl.tensor:
    update = _ratio(m, root, w)
    return tl.where(decay != 0, update + p * decay, update)


@triton.jit
def _square(x: tl.tensor) -> tl.tensor:
    wide = x.to(tl.float64)
    return wide * wide


# Rules of one mean. w is d0, d1, k0, k1, and what is named.


@_rule("pmg", writes="pm", weights=True)
def sign_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g. Without m: the sign of d1 g. w: lr, factor."""
    direction = g * w[1]
    moved = 0.0
    if m is not None:
        direction = _direction(m, g, w)
        moved = _next(m, g, w)
    return p * w[5] - _signed(w[4], direction), moved, 0.0, 0.0, 0.0


@_rule("pmg", writes="pm", casts="p")
def blend_into(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- d0 m + d1 g; m <- k0 m + k1 g. Without m: d1 g."""
    direction = g * w[1]
    moved = 0.0
    if m is not None:
        direction = _direction(m, g, w)
        moved = _next(m, g, w)
    return direction, moved, 0.0, 0.0, 0.0


@_rule("pmg", writes="p", casts="p")
def direction_into(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- d0 m + d1 g."""
    return _direction(m, g, w), 0.0, 0.0, 0.0, 0.0


@_rule("pmg", writes="pm", weights=True)
def cautious_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr u [u g > 0], u = sign(direction); m moves on. w: lr, factor."""
    u = _signed(1.0, _direction(m, g, w))
    agrees = (u * g > 0).to(tl.float32)
    return p * w[5] - u * agrees * w[4], _next(m, g, w), 0.0, 0.0, 0.0


@_rule("pmg", writes="pm", weights=True)
def gated_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr h(c), c the direction: h = sign where |c| >= nu, else c; m moves on. w: lr, factor, nu."""
    c = _direction(m, g, w)
    below = (tl.abs(c) < w[6]).to(tl.float32)
    h = _signed(1.0, c) * (1.0 - below) + c * below
    return p * w[5] - h * w[4], _next(m, g, w), 0.0, 0.0, 0.0


@_rule("pmg", writes="pm", weights=True)
def raw_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr direction; m moves on. w: lr, factor."""
    return p * w[5] - _direction(m, g, w) * w[4], _next(m, g, w), 0.0, 0.0, 0.0


@_rule("mg", columns=1)
def agreement(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """How many elements' gradients point where the direction does."""
    c = _direction(m, g, w)
    agrees = ((c > 0) & (g > 0)) | ((c < 0) & (g < 0))
    return 0.0, 0.0, 0.0, agrees.to(tl.float64), 0.0


@_rule("mg", columns=1)
def count_from(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """How many elements have |direction| >= nu. w: nu."""
    return 0.0, 0.0, 0.0, (tl.abs(_direction(m, g, w)) >= w[4]).to(tl.float64), 0.0


@_rule("mg", columns=1, join="min")
def smallest_nonzero(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """The smallest |direction| that is not 0."""
    size = tl.abs(_direction(m, g, w))
    return 0.0, 0.0, 0.0, tl.where(size == 0, float("inf"), size).to(tl.float64), 0.0


@_rule("mg", writes="m", columns=1, join="max")
def move_momentum(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """m moves on; the largest |m|."""
    moved = _next(m, g, w)
    return 0.0, moved, 0.0, tl.abs(moved).to(tl.float64), 0.0


@_rule("mg", columns=1)
def direction_squares(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """The sum of squares of the direction."""
    return 0.0, 0.0, 0.0, _square(_direction(m, g, w)), 0.0


@_rule("mg", columns=1)
def lasm_difference(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """The sum of (g - m)^2."""
    return 0.0, 0.0, 0.0, _square(g - m), 0.0


@_rule("g", columns=1)
def square_sums(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """The sum of squares."""
    return 0.0, 0.0, 0.0, _square(g), 0.0


# Rules with noise, of a stream of their own.


@_rule("pm", writes="p", noisy=True, weights=True)
def stochastic_sign_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr sign(m + bound noise). w: bound, lr, factor."""
    return p * w[2] - _signed(w[1], noise * w[0] + m), 0.0, 0.0, 0.0, 0.0


@_rule("pmvg", writes="pmv", noisy=True, weights=True)
def stochastic_element_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """m moves on; v <- max(v, |m|), NaN where either is; the step of stochastic_sign_step with v for bound.

    w: lr, factor.
    """
    moved = _next(m, g, w)
    size = tl.abs(moved)
    limit = tl.where((size <= v) | (v != v), v, size)
    return p * w[5] - _signed(w[4], noise * limit + moved), moved, limit, 0.0, 0.0


# Updates made elsewhere.


@_rule("pg", writes="p", casts="g", weights=True)
def apply_update(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - rate g, or m for g where the update is int8 with scales. w: rate, factor."""
    change = m
    if g is not None:
        change = g
    return p * w[1] - change * w[0], 0.0, 0.0, 0.0, 0.0


@_rule("pg", writes="p", casts="pg")
def copy_into(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- g."""
    return g, 0.0, 0.0, 0.0, 0.0


# Rules with a second moment. w and d are the fields of ``MomentWeights``, beta, rest, eps, k0, k1, mean and deviation,
# and what is named.


@_rule("pmvg", writes="pmv", weights=True)
def lasm_element_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """v is a root, moved on by g - m; m <- k0 m + k1 g / (1 + v); p <- factor p - lr sign(m). w: lr, factor."""
    root = _next_root(v, g - m, d)
    moved = m * w[3] + tl.div_rn(g, root + 1.0) * w[4]
    return p * w[8] - _signed(w[7], moved), moved, root, 0.0, 0.0


@_rule("pmvg", writes="mv", columns=2)
def lamb_measure(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """m and v, a root, move on; the sums of p^2 and r^2. w: decay."""
    moved = m * w[3] + g * w[4]
    root = _next_root(v, g, d)
    update = _lamb_update(p, moved, root, w, w[7])
    return 0.0, moved, root, _square(p), _square(update)


@_rule("pmv", writes="p")
def lamb_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- p - lr r. w: lr, decay."""
    return p - _lamb_update(p, m, v, w, w[8]) * w[7], 0.0, 0.0, 0.0, 0.0


@_rule("mvg", writes="mv", columns=1)
def stable_measure(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """m and v, a root, move on; the sum of (g / max(sqrt(v_hat), eps))^2."""
    moved = m * w[3] + g * w[4]
    root = _next_root(v, g, d)
    size = tl.div_rn(root, w[6]).to(tl.float64)
    ratio = g.to(tl.float64) / tl.where(size < d[2], d[2], size)
    return 0.0, moved, root, ratio * ratio, 0.0


@_rule("pmv", writes="p", weights=True)
def stable_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """p <- factor p - lr m_hat / (sqrt(v_hat) + eps). w: lr, factor."""
    return p * w[8] - _ratio(m, v, w) * w[7], 0.0, 0.0, 0.0, 0.0


@_rule("pmvg", writes="pmv", weights=True)
def adamw_step(p: Tile, m: Tile, v: Tile, g: Tile, noise: Tile, w: Numbers, d: Numbers) -> Numbers:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g g; p <- factor p - rate m / (sqrt(v) / correction + eps).

    w: b1, 1 - b1, b2, 1 - b2, eps, correction, rate, factor. Root and quotients are rounded correctly. Torch's are so
    on no device: a CPU's root may come from a vector library, and a GPU multiplies by the reciprocal of the correction.
    Both may be a last bit off.
    """
    mean = m * w[0] + g * w[1]
    square = v * w[2] + g * g * w[3]
    change = tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), w[5]) + w[4]) * w[6]
    return p * w[7] - change, mean, square, 0.0, 0.0
