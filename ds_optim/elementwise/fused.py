"""The hot steps on a GPU: whether Triton's kernels do the work, or the eager path (on bits, see ``gpu``).

Where Triton is not found, or cannot compile, the eager path takes several passes over memory, which one line says.
``DS_OPTIM_COMPILE=0`` asks for it.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import Flat

logger = logging.getLogger("ds_optim")


@dataclass
class _Cautious:
    """rate: None once it is done otherwise."""

    rate: float | None
    otherwise: Callable[[], None]
    taken: bool = False


_DEVICE = "cuda"
_LAUNCH, _ROWS = "ds_optim.elementwise.gpu.launch", "ds_optim.elementwise.gpu.row_launch"
_OF_ROWS = ("sum_rows", "gather_rows", "step_rows")
"""What takes ``chosen.Rows`` as the last of its numbers."""
_broken: list[str] = []
_waiting: ContextVar[list[Any] | None] = ContextVar("slices that wait for one launch", default=None)
_asked: ContextVar[_Cautious | None] = ContextVar("decay that the next step is to do", default=None)


def ready(device: torch.device) -> bool:
    """Whether steps on ``device`` are for the kernels."""
    return device.type == _DEVICE and not _broken and wanted()


def asked_for() -> bool:
    """Whether the kernels are not switched off."""
    return os.environ.get("DS_OPTIM_COMPILE", "1") != "0"


@cache
def wanted() -> bool:
    """Whether Triton is there and not switched off; that it is missing is said once."""
    if not asked_for():
        return False
    if find_spec("triton") is None:
        logger.warning("ds_optim: Triton is not installed, the eager steps take several passes over memory")
        return False
    return True


@contextmanager
def together() -> Iterator[None]:
    """Let the slices that are stepped or measured here wait, and go in one launch a rule and dtypes at the end.

    They must be different slices, and nothing but these calls may touch them, or read what was measured, before that.
    What would, in the midst of it, stands in a block of its own.
    """
    waiting: list[Any] = []
    before = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(before)
    if waiting:
        import_module(_LAUNCH).launch(waiting)


@contextmanager
def cautiously(rate: float, otherwise: Callable[[], None]) -> Iterator[None]:
    """Have the one step of weights that is taken here decay them where it does not turn them away from zero:
    new <- new - rate old where (old - new) old >= 0.

    otherwise: called before the weights are stepped by anything but a kernel; whoever asked is then to decay them.
    """
    before = _asked.set(_Cautious(rate, otherwise))
    try:
        yield
    finally:
        _asked.reset(before)


def step(name: str, tensors: Sequence[Flat | None], numbers: Sequence[Any]) -> bool:
    """Take the step of this name of ``gpu.rules``, with its tensors and numbers in its order.

    False, and nothing touched, where Triton cannot be loaded or cannot compile it, or does not know these tensors.
    """
    taken, asked = _take(name, tensors, numbers) is True, _asked.get()
    if asked is not None and asked.rate is not None:
        if asked.taken:
            raise RuntimeError(
                "a rule whose slices go together takes one step of their weights: cautious_decay is of it"
            )
        asked.taken = taken
        if not taken:
            asked.otherwise()
            asked.rate = None
    return taken


def measure(name: str, tensors: Sequence[Flat], numbers: Sequence[Any]) -> Tensor | None:
    """As :func:`step`, for one that measures: its numbers in fp64, (columns,), or of one column (); None for False."""
    found = _take(name, tensors, numbers)
    return found if isinstance(found, Tensor) else None


def _take(name: str, tensors: Sequence[Flat | None], numbers: Sequence[Any]) -> Any:
    if not ready(next(tensor.device for tensor in tensors if tensor is not None)):
        return False
    try:
        asked = _asked.get()
        rate = None if asked is None else asked.rate
        return import_module(_ROWS if name in _OF_ROWS else _LAUNCH).take(name, tensors, numbers, _waiting.get(), rate)
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
