"""What a step does to the parameters of a group, as data.

A rule reads a group's hyperparameters and the step count and answers with one of six updates; the driver
in ``base.py`` carries them out on whatever tensors there are. Most direction rules of this family are linear
in momentum and gradient, which is what a :class:`Blend` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import NARROW, Flat
from ds_optim.matrix.shapes import Shape
from ds_optim.optimizers.checks import Check
from ds_optim.sharding.layout import ParamSpec

Group = dict[str, Any]
Finish = Callable[[Tensor, Tensor | None, Tensor | None], None]

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


@dataclass(frozen=True, kw_only=True)
class SignUpdate:
    """theta <- theta (1 - lr decay) - lr sign(direction)."""

    blend: Blend
    lr: float
    decay: float


@dataclass(frozen=True, kw_only=True)
class MatrixUpdate:
    """W <- W (1 - lr decay) - lr s(m, n) F(direction), for each matrix of the view; F is the rule's shape.

    scale: the name of s in SCALES; None for 1. gate: decides for which parameters this is done. finish: what is made of
    F's result at a matrix's owner, in place, before it goes back: (results (B, m, n), the weights (B, m, n) where the
    rule's shape takes them along, the values of rows (B, m) where the rule keeps such) -> nothing.
    """

    blend: Blend
    lr: float
    decay: float
    scale: str | None
    gate: Gate | None = None
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class MatrixSignUpdate:
    """theta <- theta (1 - lr decay) - lr sign(direction), with F(G) in the place of the gradient G in the blend.

    F is the rule's shape, of each matrix of the view: what comes back from its owner is blended where it is applied.
    """

    blend: Blend
    lr: float
    decay: float


@dataclass(frozen=True, kw_only=True)
class RowsUpdate:
    """M moves on; of each matrix of the view the rows K of M with the largest sums of magnitudes, ``fraction`` of all:
    W <- W (1 - lr decay);  W_K <- W_K - lr s(m, n) F(M_K);  M_K <- kept M_K, with the rule's shape for F.

    Of rows of one sum, compared in fp32, the first ones. Momentum is in the dtype of computation.
    """

    blend: Blend
    lr: float
    decay: float
    scale: str | None
    fraction: float
    kept: float


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A parameter steps by its own direction, W <- W (1 - lr decay) - lr direction, unless its gate is open.

    By one of two figures of its new momentum, which must be at least ``threshold``: the root mean square of its
    matrices' Frobenius norms, or ("singular_gap") the smallest gap between singular values of one of them.
    """

    figure: str
    threshold: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class AdamWUpdate:
    """AdamW with bias correction, decoupled decay first; ``step`` counts from 1."""

    lr: float
    decay: float
    betas: tuple[float, float]
    eps: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's slice of a parameter: flat views (n,) of weights, gradient and state.

    ``start`` is the place of its first element in the parameter ``spec``; ``momentum`` and ``second`` are the buffers
    of rules that keep them, which know them as ``m`` and ``v``; ``scratch`` is for this step.
    """

    spec: ParamSpec
    start: int
    p: Flat
    g: Flat
    momentum: Flat | None
    second: Tensor | None
    scratch: Scratch

    @property
    def m(self) -> Flat:
        assert self.momentum is not None
        return self.momentum

    @property
    def v(self) -> Tensor:
        assert self.second is not None
        return self.second

    @property
    def wide_m(self) -> Tensor:
        """m of a rule with two buffers, which are in the dtype of computation."""
        assert isinstance(self.m, Tensor)
        return self.m


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Numbers of a whole parameter: ``partial`` gives a slice's, ``op`` ("sum", "min", "max") joins the slices'.

    ``partial`` may move state on. At most two columns: 16 bytes a parameter and step on the wire.
    """

    op: str
    columns: int
    partial: Callable[[Piece], Sequence[Tensor]]


@dataclass(frozen=True)
class Decision:
    """What was concluded for one parameter, by all ranks alike.

    lr: the step size, of decay too. value: for the rule's ``apply``. scalar: to be kept by rules that keep one.
    shown: diagnostics, by name; "min ..." names are joined over parameters by their minimum, others averaged.
    """

    lr: float
    value: float = 0.0
    scalar: float | None = None
    shown: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParameterUpdate:
    """A step that must know the parameter that an element belongs to: its name, or numbers of all of it.

    measure: what is asked of the whole parameter first; None for nothing. decide: (parameter, its numbers,
    the scalar kept for it) -> a decision. apply: the step of a slice, under that decision. decay: for the
    diagnostics, of rules that decay weights before they update them.
    """

    decide: Callable[[ParamSpec, Sequence[float], float], Decision]
    apply: Callable[[Piece, Decision], None]
    measure: Measure | None = None
    decay: float = 0.0


Update = SignUpdate | MatrixUpdate | MatrixSignUpdate | RowsUpdate | AdamWUpdate | ParameterUpdate


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


def average(beta: float) -> Blend:
    """m <- beta m + (1 - beta) g, and the direction is the new m."""
    return Blend((beta, 1 - beta), (beta, 1 - beta))


def lion_blend(betas: tuple[float, float]) -> Blend:
    """c = b1 m + (1 - b1) g is the direction; m <- b2 m + (1 - b2) g."""
    b1, b2 = betas
    return Blend((b1, 1 - b1), (b2, 1 - b2))


SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "unit_rms": lambda m, n: math.sqrt(m / n),
}
"""s(m, n) for a matrix with m rows (fan-out) and n columns."""
