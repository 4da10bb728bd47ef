"""Who calls ``optimizer.step()``: the DeepSpeed wrapper that holds it, found on the call stack.

A client optimizer is handed no engine and no config. The wrapper that steps it is the one thing that knows
whether the settings are ones that this package supports, and whether the call belongs to set-up.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

_DEPTH = 12  # hooks of torch and of schedulers stand between the wrapper and the optimizer


@dataclass(frozen=True)
class Caller:
    """The object whose ``optimizer`` is being stepped, and the name of its method that does so."""

    wrapper: Any
    method: str


def find_caller(optimizer: object) -> Caller | None:
    """The nearest frame whose ``self`` holds ``optimizer``; None where the user's own code steps it."""
    frame = inspect.currentframe()
    for _ in range(_DEPTH):
        if frame is None:
            return None
        owner = frame.f_locals.get("self")
        if owner is not None and owner is not optimizer and getattr(owner, "optimizer", None) is optimizer:
            return Caller(owner, frame.f_code.co_name)
        frame = frame.f_back
    return None
