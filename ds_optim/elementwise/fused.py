"""The hot steps on a GPU: whether Triton's kernels do the work, or the eager path (on bits, see ``gpu``).

Where Triton is not found, or cannot compile, the eager path takes several passes over memory, which one line says.
``DS_OPTIM_COMPILE=0`` asks for it. Each function answers whether the work was done; if not, nothing was touched.
"""

from __future__ import annotations

import logging
import os
import subprocess
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import Flat
from ds_optim.elementwise.native.steps import AdamW, Weights

logger = logging.getLogger("ds_optim")

_DEVICE = "cuda"
_broken: list[str] = []


def sign_step(p: Flat, m: Flat | None, g: Flat, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g."""
    return ready(p.device) and _run("sign_step", p, m, g, weights, lr, factor)


def blend_into(out: Tensor, m: Flat | None, g: Flat, weights: Weights) -> bool:
    """out <- d0 m + d1 g; m <- k0 m + k1 g."""
    return ready(g.device) and _run("blend_into", out, m, g, weights)


def apply_update(p: Flat, update: Flat, rate: float, factor: float) -> bool:
    """p <- factor p - rate update."""
    return ready(p.device) and _run("apply_update", p, update, rate, factor)


def adamw_step(p: Flat, m: Tensor, v: Tensor, g: Flat, numbers: AdamW) -> bool:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g g; p <- factor p - rate m / (sqrt(v) / correction + eps)."""
    return ready(p.device) and _run("adamw_step", p, m, v, g, numbers)


def ready(device: torch.device) -> bool:
    """Whether steps on ``device`` are for the kernels."""
    return device.type == _DEVICE and not _broken and wanted()


@cache
def wanted() -> bool:
    """Whether Triton is there and not switched off; that it is missing is said once."""
    if os.environ.get("DS_OPTIM_COMPILE", "1") == "0":
        return False
    if find_spec("triton") is None:
        logger.warning("ds_optim: Triton is not installed, the eager steps take several passes over memory")
        return False
    return True


def _run(step: str, *arguments: object) -> bool:
    """Call a step of ``gpu.launch``; False, and nothing touched, where Triton cannot be loaded or cannot compile it."""
    try:
        return bool(getattr(import_module("ds_optim.elementwise.gpu.launch"), step)(*arguments))
    except Exception as problem:  # compilers fail in many ways, all before a kernel is launched
        if not _is_compilers(problem):
            raise
        _broken.append(str(problem))
        reason = (str(problem).strip() or type(problem).__name__).split("\n")[0]
        logger.warning("ds_optim: Triton failed, the eager steps take several passes over memory (%s)", reason)
        return False


def _is_compilers(problem: Exception) -> bool:
    """Whether Triton is to blame, or an assembler or C compiler that it calls, and not the device or a caller."""
    if isinstance(problem, torch.AcceleratorError):
        return False
    known = isinstance(problem, ImportError | OSError | RuntimeError | subprocess.SubprocessError)
    return known or type(problem).__module__.startswith("triton")
