"""How much of the suite runs.

The default tier is to take under 3 minutes on two cores, and takes 2 min 59 s (2026-11-28, two cores that do nothing
else): a cell of each kind, every rule unsharded and at one stage.
``pytest --full``, which continuous integration runs in 25 minutes, adds the other cells and the tests marked ``full``.
With DS_OPTIM_ALL_CELLS=1 all of every product runs, for hours. Ranks read the same from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

ENVIRONMENT = "DS_OPTIM_FULL"
"""Set by ``--full``, before the first file of tests is imported."""
ALL = bool(os.environ.get("DS_OPTIM_ALL_CELLS"))
FULL = ALL or bool(os.environ.get(ENVIRONMENT))


def cells(default: Iterable[T], full: Iterable[T] = (), every: Iterable[T] = ()) -> list[T]:
    """The cells of this tier: those of the default one, what --full adds, and what DS_OPTIM_ALL_CELLS adds; each once,
    in the order of the widest tier that runs."""
    chosen = [*default] if not FULL else [*default, *full] if not ALL else [*default, *full, *every]
    return [cell for number, cell in enumerate(chosen) if cell not in chosen[:number]]
