"""Lion: the sign of a blend of momentum and gradient (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import SignUpdate, lion_blend


@rule("lion", hyper={"betas": check_betas}, aux={"lr": 1e-4, "betas": (0.9, 0.99)})
def lion(group: Group, step: int) -> SignUpdate:
    return SignUpdate(blend=lion_blend(group["betas"]), lr=group["lr"], decay=group["weight_decay"])


@register(
    rules="lion",
    step="sign of a blend of momentum and gradient",
    moves="nothing",
    when="for half of AdamW's state and nothing else new",
    paper="Chen et al. 2023, arXiv 2302.06675",
    claim="less memory than Adam",
    tuned={"qwen3-tiny": {"lr": 1e-3, "weight_decay": 0.1}},
)
class Lion(ZeroOptimizer):
    """Lion, for every parameter.

    c = b1 m + (1 - b1) g;  theta <- theta (1 - lr wd) - lr sign(c);  m <- b2 m + (1 - b2) g,
    with sign(0) = 0: a parameter without gradient and momentum stands still. Decay comes before the update, and so is
    of the weights that the gradient was taken at: the paper's theta - lr (sign(c) + wd theta). Example code that is
    passed around decays after it, which shrinks the step just made by lr wd as well.

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: the size of each element's step.
        betas: (b1, b2).
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).

    Keeps one fp32 value a parameter and moves nothing between ranks.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            rule="lion",
            lr=lr,
            weight_decay=weight_decay,
            hyper={"betas": betas},
            options=dict(options),
        )
