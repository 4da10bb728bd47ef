"""The learning rate over a run: linear warmup, then a cosine to 0."""

from __future__ import annotations

import math
from typing import Any


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """What the learning rate is multiplied by at ``step`` (from 0): positive from the first, 0 at ``steps``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class WarmupCosine:
    """Sets each group's ``lr`` before a step, from the rate that the group started with.

    A function of the step alone, so that a resumed run needs nothing from it; and it leaves
    ``optimizer.step`` as it is, which torch's schedulers wrap.
    """

    def __init__(self, optimizer: Any, warmup: int, steps: int) -> None:
        self._optimizer = optimizer
        self._warmup = warmup
        self._steps = steps
        self._bases = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of ``step``, counted in updates; return the first group's."""
        factor = lr_factor(step, self._warmup, self._steps)
        for group, base in zip(self._optimizer.param_groups, self._bases, strict=True):
            group["lr"] = base * factor
        return self._bases[0] * factor
