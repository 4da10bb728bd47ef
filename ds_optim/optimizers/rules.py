"""What a step does to the parameters of a group, as data.

A rule reads a group's hyperparameters and the step count and answers with one of three updates; the driver
in ``base.py`` carries them out on whatever tensors there are. All direction rules of this family are linear
in momentum and gradient, which is what a :class:`Blend` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_optim.elementwise.blend import Blend

Group = dict[str, Any]

# The names that DeepSpeed's universal checkpoints carry, whatever the optimizer calls its buffers.
MOMENTUM = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
STEP = "step"


@dataclass(frozen=True, kw_only=True)
class SignUpdate:
    """theta <- theta (1 - lr decay) - lr sign(direction)."""

    blend: Blend
    lr: float
    decay: float


@dataclass(frozen=True, kw_only=True)
class MatrixUpdate:
    """W <- W (1 - lr decay) - lr s(m, n) polar(direction), for each matrix of the view."""

    blend: Blend
    lr: float
    decay: float
    scale: str


@dataclass(frozen=True, kw_only=True)
class AdamWUpdate:
    """AdamW with bias correction, decoupled decay first; ``step`` counts from 1."""

    lr: float
    decay: float
    betas: tuple[float, float]
    eps: float
    step: int


Update = SignUpdate | MatrixUpdate | AdamWUpdate


@dataclass(frozen=True)
class Rule:
    """A named rule: the buffers it keeps (one fp32 value a parameter each) and its update at step t.

    ``matrices`` says that some step of it needs whole matrices.
    """

    name: str
    buffers: tuple[str, ...]
    update: Callable[[Group, int], Update]
    matrices: bool = False


RULES: dict[str, Rule] = {}


def rule(
    name: str, *, buffers: tuple[str, ...] = (MOMENTUM,), matrices: bool = False
) -> Callable[[Callable[[Group, int], Update]], Callable[[Group, int], Update]]:
    """Register a function (group, steps done so far) -> update under ``name``."""

    def register(function: Callable[[Group, int], Update]) -> Callable[[Group, int], Update]:
        RULES[name] = Rule(name, buffers, function, matrices)
        return function

    return register


def rate(group: Group) -> float:
    """The group's own learning rate.

    "lr" is the same in all groups of an optimizer, so that any scheduler may set or scale it for all of
    them alike; what a group takes of it stands in "lr_scale".
    """
    return float(group["lr"]) * float(group["lr_scale"])


def average(beta: float) -> Blend:
    """m <- beta m + (1 - beta) g, and the direction is the new m."""
    return Blend((beta, 1 - beta), (beta, 1 - beta))


SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "unit_rms": lambda m, n: math.sqrt(m / n),
}
"""s(m, n) for a matrix with m rows (fan-out) and n columns."""
