"""StableAdamW: AdamW that slows down where the gradient outgrows its second moment (arXiv 2304.13013)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ds_optim.elementwise.moments import Moments, stable_measure, stable_step
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas, check_positive
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import ROOT_SQUARES, WIDE_MEAN, Group, rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate, Piece
from ds_optim.sharding.layout import ParamSpec


@rule("stable_adamw", hyper={"betas": check_betas, "eps": check_positive}, buffers=(WIDE_MEAN, ROOT_SQUARES))
def stable_adamw(group: Group, step: int) -> ParameterUpdate:
    moments = Moments(betas=group["betas"], eps=group["eps"], step=step + 1)
    decay = group["weight_decay"]

    def partial(piece: Piece) -> list[Tensor]:
        return [stable_measure(piece.wide_m, piece.v, piece.g, moments, piece.scratch)]

    def decide(spec: ParamSpec, sums: Sequence[float], _: float) -> Decision:
        rms = math.sqrt(sums[0] / spec.whole_numel)
        return Decision(lr=group["lr"] / max(1.0, rms), shown={"slowed parameters": float(rms > 1), "mean rms": rms})

    def apply(piece: Piece, chosen: Decision) -> None:
        stable_step(piece.p, piece.wide_m, piece.v, moments=moments, lr=chosen.lr, decay=decay, scratch=piece.scratch)

    measure = Measure(op="sum", columns=1, partial=partial)
    return ParameterUpdate(measure=measure, decide=decide, apply=apply, decay=decay, together=True)


@register(
    rules="stable_adamw",
    step="AdamW, slower where gradients outgrow their history",
    moves="a sum",
    when="as a yardstick",
    paper="arXiv 2304.13013",
)
class StableAdamW(ZeroOptimizer):
    """StableAdamW, for every parameter: a yardstick whose RMS is that of parameters under ZeRO too.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  lr_t = lr / max(1, sqrt(mean(g^2 / max(v_hat, eps^2))));
    theta <- theta (1 - lr_t wd) - lr_t m_hat / (sqrt(v_hat) + eps).

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: while the root mean square above stays below 1.
        betas: (b1, b2), with bias correction.
        eps: in units of the gradient.
        weight_decay: decoupled, with lr_t, on parameters with two or more dimensions (all with ``decay_1d``).

    Keeps two fp32 values a parameter, the second of them sqrt(v), which has the gradient's range; a step joins one
    sum a parameter tensor (8 bytes) in one all-reduce.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        **options: Unpack[CommonOptions],
    ) -> None:
        hyper = {"betas": betas, "eps": eps}
        super().__init__(
            params, rule="stable_adamw", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options)
        )
