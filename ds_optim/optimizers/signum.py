"""SignSGD and Signum: the sign of the gradient, or of its running mean (Bernstein et al. 2018)."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_beta
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import SignUpdate, average


@rule("signum", hyper={"beta": check_beta}, aux={"lr": 1e-4, "beta": 0.9})
def signum(group: Group, step: int) -> SignUpdate:
    return SignUpdate(blend=average(group["beta"]), lr=group["lr"], decay=group["weight_decay"])


@rule("sign_sgd", buffers=())
def sign_sgd(group: Group, step: int) -> SignUpdate:
    return SignUpdate(blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=group["lr"], decay=group["weight_decay"])


@register(
    rules="signum",
    step="sign of the momentum",
    moves="nothing",
    when="for the simplest rule with momentum",
    paper="Bernstein et al. 2018, arXiv 1802.04434",
    tuned={"qwen3-tiny": {"lr": 1e-3, "weight_decay": 0.1}},
)
class Signum(ZeroOptimizer):
    """Signum, for every parameter.

    m <- b m + (1 - b) g;  theta <- theta (1 - lr wd) - lr sign(m).

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: the size of each element's step.
        beta: b.
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).

    Keeps one fp32 value a parameter and moves nothing between ranks.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        beta: float = 0.9,
        weight_decay: float = 0.1,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            rule="signum",
            lr=lr,
            weight_decay=weight_decay,
            hyper={"beta": beta},
            options=dict(options),
        )


@register(
    rules="sign_sgd",
    step="sign of the gradient",
    moves="nothing",
    when="when no state fits",
    paper="Bernstein et al. 2018, arXiv 1802.04434",
    tuned={"qwen3-tiny": {"lr": 5e-4, "weight_decay": 0.1}},
)
class SignSGD(ZeroOptimizer):
    """SignSGD, for every parameter: theta <- theta (1 - lr wd) - lr sign(g).

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: the size of each element's step.
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).

    Keeps no state but a step count, and moves nothing between ranks.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, weight_decay: float = 0.1, **options: Unpack[CommonOptions]
    ) -> None:
        super().__init__(params, rule="sign_sgd", lr=lr, weight_decay=weight_decay, hyper={}, options=dict(options))
