"""The hot steps on a CPU, compiled once per machine: the eager path's bits in one pass over memory."""

from __future__ import annotations

from ds_optim.elementwise.native.library import is_available
from ds_optim.elementwise.native.steps import (
    adamw_step,
    apply_update,
    blend_into,
    load,
    sign_step,
    square_sum,
    store,
    uniform_noise,
)

__all__ = [
    "adamw_step",
    "apply_update",
    "blend_into",
    "is_available",
    "load",
    "sign_step",
    "square_sum",
    "store",
    "uniform_noise",
]
