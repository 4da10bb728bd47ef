"""CautiousLion: Lion that moves only where the gradient agrees (Liang et al. 2024, arXiv 2411.16085)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.sign_rules import agreement, cautious_step
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate, Piece, lion_blend
from ds_optim.sharding.layout import ParamSpec

MOST_BOOST = 1000
"""The few weights of a sparse gradient take at most so many times the step of a dense one's."""


@rule("cautious_lion", hyper={"betas": check_betas})
def cautious_lion(group: Group, step: int) -> ParameterUpdate:
    blend = lion_blend(group["betas"])

    def decide(spec: ParamSpec, counts: Sequence[float], _: float) -> Decision:
        boost = spec.whole_numel / max(counts[0], spec.whole_numel / MOST_BOOST)
        return Decision(lr=group["lr"], value=boost, shown={"agreeing gradients": counts[0] / spec.whole_numel})

    def apply(piece: Piece, chosen: Decision) -> None:
        cautious_step(
            piece.p,
            piece.m,
            piece.g,
            blend=blend,
            lr=chosen.lr,
            decay=group["weight_decay"],
            scale=chosen.value,
            scratch=piece.scratch,
        )

    agreeing = Measure(op="sum", columns=1, partial=lambda p: [agreement(p.m, p.g, blend, p.scratch)])
    return ParameterUpdate(measure=agreeing, decide=decide, apply=apply, decay=group["weight_decay"], together=True)


@register(
    rules="cautious_lion",
    step="Lion, only where the gradient agrees",
    moves="a count",
    when="for a Lion that never steps against the gradient",
    paper="Liang et al. 2024, arXiv 2411.16085",
    claim="up to 1.47 times faster (shown for AdamW's variant)",
)
class CautiousLion(ZeroOptimizer):
    """CautiousLion (C-Lion), for every parameter.

    c = b1 m + (1 - b1) g;  u = sign(c);  k = [u g > 0];  theta <- theta (1 - lr wd) - lr u k N / max(sum k, N/1000);
    m <- b2 m + (1 - b2) g, with N and the sum over the whole parameter.

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: the size of each element's step while all gradients agree.
        betas: (b1, b2).
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).

    The floor N/1000 bounds the boost where gradients are sparse. ``diagnostics`` logs the share of gradients that
    agree.

    Keeps one fp32 value a parameter; a step joins one count a parameter tensor (8 bytes) in one all-reduce.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 1.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            rule="cautious_lion",
            lr=lr,
            weight_decay=weight_decay,
            hyper={"betas": betas},
            options=dict(options),
        )
