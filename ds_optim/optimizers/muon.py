"""Muon: momentum, orthogonalized (Jordan 2024), and Muonlight, its variant with AdamW's step size.

Muonlight is Moonlight's recipe (arXiv 2502.16982) under the name that arXiv 2602.07425 gives it.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_beta, check_bool, one_of
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import SCALES, MatrixUpdate, average


@rule(
    "muon",
    hyper={"momentum": check_beta, "nesterov": check_bool, "scale": one_of(SCALES)},
    shape=POLAR,
)
def muon(group: Group, step: int) -> MatrixUpdate:
    mu = group["momentum"]
    blend = average(mu)
    if group["nesterov"]:
        # U = mu M' + (1 - mu) G with M' = mu M + (1 - mu) G, written out in the old M.
        blend = Blend((mu * mu, 1 - mu * mu), blend.momentum)
    return MatrixUpdate(blend=blend, lr=group["lr"], decay=group["weight_decay"], scale=group["scale"])


@register(
    rules="muon",
    step="momentum, orthogonalized",
    moves="cut matrices",
    when="for the rule that most results are published with",
    paper="Jordan 2024",
    claim="3.53 (AdamW 3.55) ¹",
    tuned={"qwen3-tiny": {"lr": 2e-2, "aux_lr": 3e-3, "weight_decay": 0.1}},
)
class Muon(ZeroOptimizer):
    """Muon for matrices, the aux rule for the rest.

    M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G if nesterov else M;
    W <- W (1 - lr wd) - lr s polar(U), with polar(U) by Newton-Schulz.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: of the matrices.
        momentum: mu.
        nesterov: look one gradient ahead.
        scale: s for an (m, n) matrix, m = fan-out: "spectral" sqrt(max(1, m/n)), "match_rms_adamw"
            0.2 sqrt(max(m, n)), "unit_rms" sqrt(m/n). In Emerging-Optimizers and Megatron "spectral" is another,
            sqrt(max(m, n)), and this one "shape_scaling": take no rate from there to "spectral" here.
        weight_decay: decoupled; none by default, as in the source.

    Keeps one fp32 value a parameter (``aux="adamw"``: two on what is no matrix). At stage 3 a step moves
    2 (N-1)/N^2 elements per matrix element and rank; at stages 1 and 2 only matrices that a border cuts.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "spectral",
        weight_decay: float = 0.0,
        **options: Unpack[MatrixOptions],
    ) -> None:
        hyper = {"momentum": momentum, "nesterov": nesterov, "scale": scale}
        super().__init__(params, rule="muon", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options))


@register(
    rules="muon",
    step="Muon with AdamW's step size",
    moves="cut matrices",
    when="to keep AdamW's learning rate and decay",
    paper="arXiv 2502.16982",
    claim="about half of AdamW's compute",
    tuned={"qwen3-tiny": {"lr": 1e-2, "aux_lr": 1e-3, "weight_decay": 0.1}},
)
class Muonlight(Muon):
    """Muon with the scale "match_rms_adamw", so that AdamW's learning rates and decay carry over.

    Args: as :class:`Muon`, with other defaults.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        weight_decay: float = 0.1,
        **options: Unpack[MatrixOptions],
    ) -> None:
        super().__init__(params, lr, momentum, nesterov, scale, weight_decay, **options)
