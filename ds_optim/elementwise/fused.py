"""The hot steps on a GPU in one kernel each: ``torch.compile`` of the formulas that the eager path spells out.

What changes from step to step (rates, weights of a blend) is a tensor, and lengths are symbols, so that nothing is ever
compiled anew for a shape or a learning rate. A compiler for GPUs may contract a product and a sum into one rounding:
directions are within one unit in the last place of the eager path's. Where Triton is not found, or compiling fails, the
eager path does the work, which one line says. ``DS_OPTIM_COMPILE=0`` asks for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import Flat, Stored
from ds_optim.elementwise.native.steps import Weights

logger = logging.getLogger("ds_optim")

_broken: list[str] = []


def sign_step(p: Flat, m: Flat | None, g: Flat, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g. Whether it was done."""
    if not _suits(p) or not _suits(g) or isinstance(m, Stored):
        return False
    if m is None:
        return _run(_sign_of_gradient, (p, g), (weights[1], lr, factor))
    return _run(_sign, (p, m, g), (*weights, lr, factor))


def blend_into(out: Tensor, m: Flat | None, g: Flat, weights: Weights) -> bool:
    """out <- d0 m + d1 g; m <- k0 m + k1 g. Whether it was done."""
    if not _suits(g) or m is None or isinstance(m, Stored) or out.device != g.device:
        return False
    return _run(_blend, (out, m, g), weights)


def apply_update(p: Flat, update: Tensor, rate: float, factor: float) -> bool:
    """p <- factor p - rate update. Whether it was done."""
    if not _suits(p) or update.device != p.device:
        return False
    return _run(_apply, (p, update), (rate, factor))


def _sign(p: Tensor, m: Tensor, g: Tensor, s: Tensor) -> None:
    d0, d1, k0, k1, lr, factor = s.unbind()
    direction = g * d1 + m * d0
    m.copy_(m * k0 + g * k1)
    p.copy_(p * factor - lr * torch.sign(direction))


def _sign_of_gradient(p: Tensor, g: Tensor, s: Tensor) -> None:
    d1, lr, factor = s.unbind()
    p.copy_(p * factor - lr * torch.sign(g * d1))


def _blend(out: Tensor, m: Tensor, g: Tensor, s: Tensor) -> None:
    d0, d1, k0, k1 = s.unbind()
    direction = g * d1 + m * d0
    m.copy_(m * k0 + g * k1)
    out.copy_(direction)


def _apply(p: Tensor, update: Tensor, s: Tensor) -> None:
    rate, factor = s.unbind()
    p.copy_(p * factor - update.to(p.dtype) * rate)


def _suits(tensor: Flat) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda" and tensor.dtype == torch.float32 and _wanted()


@cache
def _wanted() -> bool:
    if os.environ.get("DS_OPTIM_COMPILE", "1") == "0":
        return False
    if find_spec("triton") is None:
        logger.warning("ds_optim: Triton is not installed, the eager steps take several passes over memory")
        return False
    return True


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _run(function: Callable[..., None], tensors: tuple[Tensor, ...], scalars: tuple[float, ...]) -> bool:
    """Call a compiled function; False, and nothing touched, where it cannot be compiled."""
    if _broken or tensors[0].numel() < 2:  # one element is a shape of its own to the compiler
        return False
    rates = torch.tensor(scalars, dtype=torch.float32, device=tensors[0].device)
    try:
        _compiled(function)(*tensors, rates)
    except Exception as problem:  # compilers fail in many ways, all before anything is written
        if not _is_compilers(problem):
            raise
        _broken.append(str(problem))
        logger.warning("ds_optim: torch.compile failed, the eager steps do the work (%s)", str(problem).split("\n")[0])
        return False
    return True


def _is_compilers(problem: Any) -> bool:
    return type(problem).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
