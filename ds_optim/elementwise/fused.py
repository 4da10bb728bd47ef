"""The hot steps on a GPU: whether Triton's kernels do the work, or the eager path (on bits, see ``gpu``).

Where Triton is not found, or cannot compile, the eager path takes several passes over memory, which one line says.
``DS_OPTIM_COMPILE=0`` asks for it.
"""

from __future__ import annotations

import logging
import os
import subprocess
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

logger = logging.getLogger("ds_optim")

_DEVICE = "cuda"
_broken: list[str] = []


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


def step(name: str, device: torch.device, *arguments: object) -> bool:
    """Take the step of this name of ``gpu.launch``, with tensors on ``device``.

    False, and nothing touched, where Triton cannot be loaded or cannot compile it, or does not know these tensors.
    """
    if not ready(device):
        return False
    try:
        return bool(getattr(import_module("ds_optim.elementwise.gpu.launch"), name)(*arguments))
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
