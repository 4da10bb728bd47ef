"""The hot steps on a CPU, compiled once per machine: the eager path's bits in one pass over memory."""

from __future__ import annotations

from ds_optim.elementwise.native import rules
from ds_optim.elementwise.native.library import is_available
from ds_optim.elementwise.native.rules import suits
from ds_optim.elementwise.native.steps import AdamW, adamw_step, apply_update, blend_into, load, sign_step, store

__all__ = [
    "AdamW",
    "adamw_step",
    "apply_update",
    "blend_into",
    "is_available",
    "load",
    "rules",
    "sign_step",
    "store",
    "suits",
]
