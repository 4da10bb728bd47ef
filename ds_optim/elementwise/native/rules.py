"""Calls of the compiled passes of ``rules.c`` and ``moments.c``, for the rules that measure before they step.

Each says whether it could do the work, or answers None; nothing was touched then. What a kernel computes, the eager
path says that stands beside each call (``sign_rules``, ``moments``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_double, c_float, c_int64
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.native import steps
from ds_optim.elementwise.native.calling import BlendWeights, address, in_parts, is_plain, key_of
from ds_optim.elementwise.noise import NoiseKey

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

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name, _ in self._fields_)


def suits(*tensors: Any) -> bool:
    """Whether the kernels are there and know these tensors."""
    return steps.library() is not None and all(map(is_plain, tensors))


def step(kernel: str, tensors: Sequence[Tensor], numbers: Sequence[Any]) -> bool:
    """Call a kernel on all of the tensors, in its order of them and of the numbers behind them.

    numbers: floats; the weights of a blend or of moments; the key of the first element's noise.
    """
    lib = steps.library()
    if lib is None or not suits(*tensors):
        return False
    function = getattr(lib, f"ds_optim_{kernel}")

    def part(begin: int, count: int) -> None:
        places = (address(tensor, begin) for tensor in tensors)
        function(c_int64(count), *places, *(_argument(number, begin) for number in numbers))

    in_parts(tensors[0].numel(), PART, part)
    return True


def measure(
    kernel: str, tensors: Sequence[Tensor], numbers: Sequence[Any] = (), *, join: str = "sum", columns: int = 1
) -> Tensor | None:
    """As :func:`step`, and join the numbers that each part of the tensors leaves: one in fp64, or (columns,).

    join: "sum", "min", or of sizes "max". The bits do not depend on the number of threads.
    """
    lib = steps.library()
    if lib is None or not suits(*tensors):
        return None
    function, numel = getattr(lib, f"ds_optim_{kernel}"), tensors[0].numel()
    out = torch.full((max(1, -(-numel // PART)), columns), _IDENTITY[join], dtype=torch.float64, device="cpu")
    arguments = [_argument(number, 0) for number in numbers]

    def part(begin: int, count: int) -> None:
        places = (address(tensor, begin) for tensor in tensors)
        function(c_int64(count), *places, *arguments, address(out, begin // PART * columns))

    in_parts(numel, PART, part)
    while out.shape[0] > _IN_ORDER:
        out = torch.stack([_JOIN[join](piece, dim=0) for piece in out.split(_IN_ORDER)])
    total = _JOIN[join](out, dim=0)
    return total if columns > 1 else total[0]


def _argument(number: Any, begin: int) -> Any:
    """For the part that starts at ``begin``: its elements have their own noise."""
    if isinstance(number, NoiseKey):
        return key_of(number, begin)
    if isinstance(number, tuple):
        return BlendWeights(*number)
    return number if isinstance(number, ctypes.Structure) else c_float(number)
