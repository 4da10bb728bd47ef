"""What a step does to the parameters of a group, as data.

Most direction rules of this family are linear in momentum and gradient, which is what a :class:`Blend` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import Flat
from ds_optim.sharding.layout import ParamSpec

Finish = Callable[[Tensor, Tensor | None, Tensor | None], None]


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
    diagnostics, of rules that decay weights before they update them. together: ``apply`` and ``measure.partial`` call
    functions of ``ds_optim.elementwise``, one that steps weights, and do nothing else with the slice, so that a GPU may
    do all slices at once.
    """

    decide: Callable[[ParamSpec, Sequence[float], float], Decision]
    apply: Callable[[Piece, Decision], None]
    measure: Measure | None = None
    decay: float = 0.0
    together: bool = False


Update = SignUpdate | MatrixUpdate | MatrixSignUpdate | RowsUpdate | AdamWUpdate | ParameterUpdate


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
