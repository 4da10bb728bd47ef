"""Rules: what each keeps, and the update that it answers with for a group's hyperparameters and the step count.

The driver in ``base.py`` carries updates out on whatever tensors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ds_optim.elementwise.momentum import NARROW
from ds_optim.matrix.shapes import Shape
from ds_optim.optimizers.checks import Check
from ds_optim.optimizers.updates import Update

Group = dict[str, Any]

# The names that DeepSpeed's universal checkpoints carry, whatever the optimizer calls its buffers.
MOMENTUM = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
CODES_OF_MOMENTUM = "exp_avg_codes"
"""Of int8 momentum, in its place: codes are no values, and DeepSpeed's tools take what "exp_avg" holds for values."""
SCALES_OF_MOMENTUM = "exp_avg_scale"
"""Beside the codes: one fp32 for each block of each slice, in the order of the slices."""
STEP = "step"
SCALARS = "scalars"
"""{name of the parameter: its number}, for rules that keep one; the same on all ranks."""


ELEMENT, ROW, PARAMETER = "element", "row", "parameter"
"""The kinds of buffers: a value for each element, for each row of its matrices, for each parameter tensor."""


@dataclass(frozen=True)
class Buffer:
    """Something that a rule keeps, and all that others must know of it.

    key: its name in the state. kind: ELEMENT, which is cut as the parameter is, in the dtype of computation; ROW, one
    fp32 value for each row of the parameter's matrices, which goes with a matrix to its owner and comes back moved on;
    PARAMETER, a number that all ranks hold. means: what it is of, for conversions: another rule's state goes over where
    key and meaning are the same. narrow: of a momentum that may be stored as bfloat16 or int8.
    """

    key: str
    kind: str = ELEMENT
    means: str = "its own"
    narrow: bool = False


MEAN = Buffer(MOMENTUM, means="the mean of gradients", narrow=True)
WIDE_MEAN = replace(MEAN, narrow=False)
"""Of rules that keep a second value, and take both in the dtype of computation."""
ROOT_SQUARES = Buffer(SECOND_MOMENT, means="the root of the mean of squared gradients")


@dataclass(frozen=True)
class Rule:
    """A named rule: the buffers it keeps and its update at step t.

    hyper: what it reads of a group besides "lr" and "weight_decay", with the check of each. shape: the function of
    whole matrices that some step of it asks for. aux: of a rule that may be the aux rule of others, its "lr" and
    hyperparameters there where nobody writes them. decoupled: decay is lr times "weight_decay" of each weight and
    nothing else, so that somebody else may do it in its place.
    """

    name: str
    buffers: tuple[Buffer, ...]
    update: Callable[[Group, int], Update]
    hyper: Mapping[str, Check] = field(default_factory=dict)
    shape: Shape | None = None
    aux: Mapping[str, Any] | None = None
    decoupled: bool = True

    @cached_property
    def elements(self) -> tuple[str, ...]:
        """The keys of its buffers that hold a value for each element."""
        return tuple(buffer.key for buffer in self.buffers if buffer.kind == ELEMENT)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The keys of its buffers that hold a value for each row of a matrix."""
        return tuple(buffer.key for buffer in self.buffers if buffer.kind == ROW)

    @cached_property
    def scalar(self) -> bool:
        """Whether it keeps a number for each parameter tensor."""
        return any(buffer.kind == PARAMETER for buffer in self.buffers)

    @cached_property
    def narrow(self) -> bool:
        """Whether its momentum may be stored in fewer bits."""
        return any(buffer.narrow for buffer in self.buffers)

    def element_dtypes(self, momentum_dtype: torch.dtype, wide: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
        """By the names that they have in the state, the dtypes of its buffers by element.

        momentum_dtype: of a momentum that may be stored in fewer bits. wide: of all others.
        """
        found = {}
        for buffer in self.buffers:
            if buffer.kind == ELEMENT:
                narrow = buffer.narrow and momentum_dtype in NARROW
                key = CODES_OF_MOMENTUM if narrow and momentum_dtype == torch.int8 else buffer.key
                found[key] = momentum_dtype if narrow else wide
        return found


FRACTION = "fraction"
"""The hyperparameter of rules that take some rows of each matrix a step; without it they take all."""

RULES: dict[str, Rule] = {}


def rule(
    name: str,
    *,
    hyper: Mapping[str, Check] | None = None,
    buffers: tuple[Buffer, ...] = (MEAN,),
    shape: Shape | None = None,
    aux: Mapping[str, Any] | None = None,
    decoupled: bool = True,
) -> Callable[[Callable[[Group, int], Update]], Callable[[Group, int], Update]]:
    """Register a function (group, steps done so far) -> update under ``name``.

    Raises:
        ValueError: the name is taken by another rule, or its buffers are none that it can have.
    """

    def register(function: Callable[[Group, int], Update]) -> Callable[[Group, int], Update]:
        _check_new(name, function, buffers, shape)
        kept = any(buffer.kind == ROW for buffer in buffers)
        seen = replace(shape, rows=True) if shape is not None and kept else shape
        RULES[name] = Rule(name, buffers, function, hyper or {}, seen, aux, decoupled)
        return function

    return register


def _check_new(name: str, function: Callable[..., Any], buffers: Sequence[Buffer], shape: Shape | None) -> None:
    known = RULES.get(name)
    if known is not None and (known.update.__module__, known.update.__qualname__) != (
        function.__module__,
        function.__qualname__,
    ):
        raise ValueError(f"the rule {name!r} is {known.update.__module__}'s: choose another name")
    keys = [buffer.key for buffer in buffers]
    fixed = {ELEMENT: (MOMENTUM, SECOND_MOMENT), PARAMETER: (SCALARS,)}
    for buffer in buffers:
        if buffer.kind not in (ELEMENT, ROW, PARAMETER) or buffer.key not in fixed.get(buffer.kind, (buffer.key,)):
            raise ValueError(
                f"the rule {name!r} has no place for {buffer}: a value by element is {MOMENTUM!r} or "
                f"{SECOND_MOMENT!r}, a number by parameter {SCALARS!r}, and a value by row has a key of its own"
            )
    if sum(buffer.kind == ROW for buffer in buffers) > (shape is not None):
        raise ValueError(f"the rule {name!r}: one value a row at most, of a rule with a shape")
    if len(set(keys)) < len(keys) or (SECOND_MOMENT in keys and any(buffer.narrow for buffer in buffers)):
        raise ValueError(f"the rule {name!r}: each buffer has its own key, and of two by element none is narrow")
