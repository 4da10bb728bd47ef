"""Calls of the compiled passes of ``rules.c`` and ``moments.c``, for the rules that measure before they step.

Each says whether it could do the work, or answers None; nothing was touched then. A pass that measures answers with a
number in fp64, or with several, (columns,); their bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_double, c_float, c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.native import steps
from ds_optim.elementwise.native.calling import BlendWeights, Key, address, in_parts, is_plain
from ds_optim.elementwise.native.steps import Weights

PART = 1 << 14
"""Elements that a pass joins into one number, as in ``parts.h``."""
_IN_ORDER = 1 << 12
"""Numbers that torch joins in one thread."""
_IDENTITY = {"sum": 0.0, "min": float("inf"), "max": 0.0}
_JOIN: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}


class MomentWeights(ctypes.Structure):
    """root <- sqrt(beta root^2 + rest x^2); m <- k0 m + k1 g; m_hat = m / mean, sqrt(v_hat) = root / deviation."""

    _fields_ = (
        ("beta", c_double),
        ("rest", c_double),
        ("eps", c_double),
        ("k0", c_float),
        ("k1", c_float),
        ("mean", c_float),
        ("deviation", c_float),
    )


def suits(*tensors: Any) -> bool:
    """Whether the kernels are there and know these tensors."""
    return steps.library() is not None and all(map(is_plain, tensors))


# ------------------------------------------------------------------------------------------------ sign rules


def agreement(m: Tensor, g: Tensor, weights: Weights) -> Tensor | None:
    """How many elements have u g > 0, u the sign of the direction."""
    return _measure("ds_optim_agreement", (m, g), BlendWeights(*weights), join="sum")


def count_from(m: Tensor, g: Tensor, weights: Weights, nu: float) -> Tensor | None:
    """How many elements have |direction| >= nu."""
    return _measure("ds_optim_count_from", (m, g), BlendWeights(*weights), c_float(nu), join="sum")


def smallest_nonzero(m: Tensor, g: Tensor, weights: Weights) -> Tensor | None:
    """The smallest |direction| that is not 0, infinity where all are, NaN where one is."""
    return _measure("ds_optim_smallest_nonzero", (m, g), BlendWeights(*weights), join="min")


def move_momentum(m: Tensor, g: Tensor, weights: Weights) -> Tensor | None:
    """m <- k0 m + k1 g; the largest |m|, NaN where one is."""
    return _measure("ds_optim_move_momentum", (m, g), BlendWeights(*weights), join="max")


def square_sums(values: Tensor) -> Tensor | None:
    """The sum of squares."""
    return _measure("ds_optim_square_sums", (values,), join="sum")


def direction_squares(m: Tensor, g: Tensor, weights: Weights) -> Tensor | None:
    """The sum of squares of the direction."""
    return _measure("ds_optim_direction_squares", (m, g), BlendWeights(*weights), join="sum")


def cautious_step(p: Tensor, m: Tensor, g: Tensor, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr u [u g > 0]; m <- k0 m + k1 g."""
    return _step("ds_optim_cautious_step", (p, m, g), BlendWeights(*weights), c_float(lr), c_float(factor))


def gated_step(p: Tensor, m: Tensor, g: Tensor, weights: Weights, lr: float, factor: float, nu: float) -> bool:
    """p <- factor p - lr h(direction), h = sign from nu on; m <- k0 m + k1 g."""
    scalars = c_float(lr), c_float(factor), c_float(nu)
    return _step("ds_optim_gated_step", (p, m, g), BlendWeights(*weights), *scalars)


def raw_step(p: Tensor, m: Tensor, g: Tensor, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr direction; m <- k0 m + k1 g."""
    return _step("ds_optim_raw_step", (p, m, g), BlendWeights(*weights), c_float(lr), c_float(factor))


def stochastic_sign_step(
    p: Tensor, m: Tensor, bound: float, lr: float, factor: float, *, seed: int, stream: int, step: int, start: int
) -> bool:
    """p <- factor p - lr sign(m + bound n), n the noise of (seed, stream, step) from the element ``start`` on."""
    scalars = c_float(bound), c_float(lr), c_float(factor), (seed, stream, step, start)
    return _step("ds_optim_stochastic_sign_step", (p, m), *scalars)


def stochastic_element_step(
    p: Tensor,
    m: Tensor,
    bounds: Tensor,
    g: Tensor,
    weights: Weights,
    lr: float,
    factor: float,
    *,
    seed: int,
    stream: int,
    step: int,
    start: int,
) -> bool:
    """m <- k0 m + k1 g; bounds <- max(bounds, |m|); p <- factor p - lr sign(m + bounds n)."""
    scalars = BlendWeights(*weights), c_float(lr), c_float(factor), (seed, stream, step, start)
    return _step("ds_optim_stochastic_element_step", (p, m, bounds, g), *scalars)


# ------------------------------------------------------------------------------------------ second moments


def lasm_difference(m: Tensor, g: Tensor) -> Tensor | None:
    """The sum of (g - m)^2."""
    return _measure("ds_optim_lasm_difference", (m, g), join="sum")


def lasm_element_step(
    p: Tensor, m: Tensor, root: Tensor, g: Tensor, weights: MomentWeights, lr: float, factor: float
) -> bool:
    """root moves on by g - m; m <- k0 m + k1 g / (1 + root); p <- factor p - lr sign(m)."""
    return _step("ds_optim_lasm_element_step", (p, m, root, g), weights, c_float(lr), c_float(factor))


def lamb_measure(p: Tensor, m: Tensor, root: Tensor, g: Tensor, weights: MomentWeights, decay: float) -> Tensor | None:
    """m and root move on by g; the sums of p^2 and r^2, r = m_hat / (sqrt(v_hat) + eps) + decay p."""
    scalars = weights, c_float(decay), c_int(decay != 0)
    return _measure("ds_optim_lamb_measure", (p, m, root, g), *scalars, join="sum", columns=2)


def lamb_step(p: Tensor, m: Tensor, root: Tensor, weights: MomentWeights, lr: float, decay: float) -> bool:
    """p <- p - lr r."""
    return _step("ds_optim_lamb_step", (p, m, root), weights, c_float(lr), c_float(decay), c_int(decay != 0))


def stable_measure(m: Tensor, root: Tensor, g: Tensor, weights: MomentWeights) -> Tensor | None:
    """m and root move on by g; the sum of (g / max(sqrt(v_hat), eps))^2."""
    return _measure("ds_optim_stable_measure", (m, root, g), weights, join="sum")


def stable_step(p: Tensor, m: Tensor, root: Tensor, weights: MomentWeights, lr: float, factor: float) -> bool:
    """p <- factor p - lr m_hat / (sqrt(v_hat) + eps)."""
    return _step("ds_optim_stable_step", (p, m, root), weights, c_float(lr), c_float(factor))


# --------------------------------------------------------------------------------------------------- calls


def _step(name: str, tensors: tuple[Tensor, ...], *scalars: Any) -> bool:
    """Call a kernel on all of the tensors; a tuple among the scalars is the noise's key of the first element."""
    lib = steps.library()
    if lib is None or not suits(*tensors):
        return False
    kernel = getattr(lib, name)

    def part(begin: int, count: int) -> None:
        places = (address(tensor, begin) for tensor in tensors)
        kernel(c_int64(count), *places, *(_from(scalar, begin) for scalar in scalars))

    in_parts(tensors[0].numel(), PART, part)
    return True


def _measure(name: str, tensors: tuple[Tensor, ...], *scalars: Any, join: str, columns: int = 1) -> Tensor | None:
    """Call a kernel on all of the tensors and join its parts' numbers."""
    lib = steps.library()
    if lib is None or not suits(*tensors):
        return None
    kernel, numel = getattr(lib, name), tensors[0].numel()
    out = torch.full((max(1, -(-numel // PART)), columns), _IDENTITY[join], dtype=torch.float64, device="cpu")

    def part(begin: int, count: int) -> None:
        places = (address(tensor, begin) for tensor in tensors)
        kernel(c_int64(count), *places, *scalars, address(out, begin // PART * columns))

    in_parts(numel, PART, part)
    while out.shape[0] > _IN_ORDER:
        out = torch.stack([_JOIN[join](piece, dim=0) for piece in out.split(_IN_ORDER)])
    total = _JOIN[join](out, dim=0)
    return total if columns > 1 else total[0]


def _from(scalar: Any, begin: int) -> Any:
    """A scalar for the part that starts at ``begin``: its elements have their own noise."""
    if not isinstance(scalar, tuple):
        return scalar
    seed, stream, step, start = scalar
    return Key(seed, stream, step, start + begin)
