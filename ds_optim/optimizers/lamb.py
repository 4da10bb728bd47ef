"""Lamb: AdamW's direction with a trust ratio from the norms of whole parameters (You et al. 2019, arXiv 1904.00962)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ds_optim.elementwise.moments import Moments, lamb_measure, lamb_step
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas, check_positive
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import ROOT_SQUARES, WIDE_MEAN, Group, rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate, Piece
from ds_optim.sharding.layout import ParamSpec

LARGEST_NORM = 10.0


@rule("lamb", hyper={"betas": check_betas, "eps": check_positive}, buffers=(WIDE_MEAN, ROOT_SQUARES), decoupled=False)
def lamb(group: Group, step: int) -> ParameterUpdate:
    moments = Moments(betas=group["betas"], eps=group["eps"], step=step + 1)
    decay = group["weight_decay"]

    def partial(piece: Piece) -> list[Tensor]:
        return lamb_measure(piece.p, piece.wide_m, piece.v, piece.g, moments, decay, piece.scratch)

    def decide(spec: ParamSpec, squares: Sequence[float], _: float) -> Decision:
        theta, r = (math.sqrt(square) for square in squares)
        ratio = min(theta, LARGEST_NORM) / r if theta > 0 and r > 0 else 1.0
        return Decision(lr=group["lr"], value=ratio, shown={"mean trust ratio": ratio})

    def apply(piece: Piece, chosen: Decision) -> None:
        lamb_step(
            piece.p,
            piece.wide_m,
            piece.v,
            moments=moments,
            lr=chosen.lr * chosen.value,
            decay=decay,
            scratch=piece.scratch,
        )

    measure = Measure(op="sum", columns=2, partial=partial)
    return ParameterUpdate(measure=measure, decide=decide, apply=apply, together=True)


@register(
    rules="lamb",
    step="AdamW times a trust ratio",
    moves="two norms",
    when="as a yardstick",
    paper="You et al. 2019, arXiv 1904.00962",
)
class Lamb(ZeroOptimizer):
    """Lamb, for every parameter: a yardstick whose norms are those of parameters under ZeRO too.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  r = m_hat / (sqrt(v_hat) + eps) + wd theta;
    theta <- theta - lr min(||theta||, 10) / ||r|| r, with ratio 1 where a norm is 0.

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: times the trust ratio, of r.
        betas: (b1, b2), with bias correction.
        eps: in units of the gradient.
        weight_decay: inside r, on parameters with two or more dimensions (all with ``decay_1d``).

    Keeps two fp32 values a parameter, the second of them sqrt(v), which has the gradient's range; a step joins two
    sums a parameter tensor (16 bytes) in one all-reduce.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        **options: Unpack[CommonOptions],
    ) -> None:
        hyper = {"betas": betas, "eps": eps}
        super().__init__(params, rule="lamb", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options))
