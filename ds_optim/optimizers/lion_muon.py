"""LionMuon: Muon every P-th step, Lion in between, on one shared momentum (arXiv 2605.19811)."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.noise import stream_of, uniform
from ds_optim.errors import UserError
from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import (
    check_beta,
    check_betas,
    check_bool,
    check_period,
    check_positive,
    check_whole,
    one_of,
)
from ds_optim.optimizers.options import check_options
from ds_optim.optimizers.phases import PHASE
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import MatrixUpdate, SignUpdate, lion_blend

_PERIOD_STREAM = stream_of("LionMuon.period")


_HYPER = {
    "betas": check_betas,
    "period": check_period,
    "period_mode": one_of(["fixed", "random"]),
    PHASE: check_whole,
    "sign_lr_ratio": check_positive,
}


@rule("lion_muon", hyper=_HYPER, shape=POLAR)
def lion_muon(group: Group, step: int) -> MatrixUpdate | SignUpdate:
    blend = lion_blend(group["betas"])
    phase = group.get(PHASE, 0)  # what was saved before there were phases has none
    if is_spectral(step, group["period"], group["period_mode"], group["seed"], phase):
        return MatrixUpdate(blend=blend, lr=group["lr"], decay=group["weight_decay"], scale="match_rms_adamw")
    return SignUpdate(blend=blend, lr=group["lr"] / group["sign_lr_ratio"], decay=group["weight_decay"])


def is_spectral(step: int, period: float, mode: str, seed: int, phase: int = 0) -> bool:
    """Whether a step orthogonalizes: each ``period``-th from ``phase`` on, or by a draw with probability 1 / period.

    The draw is a function of (seed, step), so that all ranks and parameters, and a resumed run, agree on it.
    """
    if not math.isfinite(period):
        return False
    if mode == "random":
        return uniform(seed=seed, stream=_PERIOD_STREAM, step=step) < 1 / period
    return (step - phase) % int(period) == 0


@register(
    rules="lion_muon",
    step="Muon each `period`-th step, Lion in between",
    moves="cut matrices, each `period`-th step",
    when="to try first: Muon's loss for a `period`-th of its exchanges",
    paper="arXiv 2605.19811",
    claim="3.50 (Muon 3.53, Lion 3.58) ¹",
    tuned={"qwen3-tiny": {"lr": 1e-2, "sign_lr_ratio": 10, "aux_lr": 2e-3, "weight_decay": 0.1}},
)
class LionMuon(ZeroOptimizer):
    """LionMuon for matrices, the aux rule for the rest.

    C = b1 M + (1 - b1) G. At steps t = 0, P, 2P, ...: W <- W (1 - lr wd) - lr 0.2 sqrt(max(m, n)) polar(C);
    at the others, with lr_L = lr / sign_lr_ratio: W <- W (1 - lr_L wd) - lr_L sign(C). Always
    M <- b2 M + (1 - b2) G after.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: of the orthogonalized steps; a schedule of it moves the sign steps too.
        betas: (b1, b2).
        weight_decay: decoupled, with the step size that the step uses.
        period: P; 1 orthogonalizes always, "inf" never (Lion at lr / sign_lr_ratio).
        sign_lr_ratio: lr over the rate of the sign steps. It grows with P: published pairs are (2, 10),
            (5, 30) and (20, 100); tuned on a model of 0.03M parameters it came to 10, 11 and 25 (docs/evidence.md,
            where the loss grows with P, too).
        period_mode: "fixed", or "random": each step orthogonalizes with probability 1 / P, all matrices at once,
            by a draw from the common option ``seed``.
        spread: let matrices take turns: of P steps each orthogonalizes about a P-th of them (those of phase k at
            steps k, k + P, ...), and the others take the sign step. Groups of matrices are cut into P.

    The aux rule's rate is lr / sign_lr_ratio unless ``aux_lr`` is given. Keeps one fp32 value a parameter
    and moves a P-th of what Muon moves.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        period: float | str = 2,
        sign_lr_ratio: float = 10.0,
        period_mode: str = "fixed",
        spread: bool = False,
        **options: Unpack[MatrixOptions],
    ) -> None:
        hyper = {
            "betas": betas,
            "period": period,
            "period_mode": period_mode,
            "sign_lr_ratio": sign_lr_ratio,
            PHASE: 0,
        }
        if check_bool("spread", spread) and period_mode == "random":
            raise UserError('spread is for period_mode "fixed": a step that is drawn is no one\'s turn')
        super().__init__(
            params,
            rule="lion_muon",
            lr=lr,
            weight_decay=weight_decay,
            hyper=hyper,
            options=dict(options),
            spread=check_bool("spread", spread),
        )


@register(
    rules="lion_muon",
    step="LionMuon with one beta",
    moves="cut matrices, each `period`-th step",
    when="for short runs",
    paper="arXiv 2605.19811",
    claim="4.21 to 4.23 (Muon 4.24 to 4.25) ²",
    tuned={"qwen3-tiny": {"lr": 1e-2, "sign_lr_ratio": 10, "aux_lr": 1e-3, "weight_decay": 0.1}},
)
class SignMuon(LionMuon):
    """LionMuon with b1 = b2: one running mean, orthogonalized every P-th step, its sign taken in between.

    arXiv 2605.16311 gives the name to another rule, sign(polar(M)) at every step: that is
    ``SpectralLion(betas=(b, b))`` here.

    Args: as :class:`LionMuon`, with one ``beta`` for both.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        beta: float = 0.9,
        weight_decay: float = 0.1,
        period: float | str = 2,
        sign_lr_ratio: float = 30.0,
        period_mode: str = "fixed",
        spread: bool = False,
        **options: Unpack[MatrixOptions],
    ) -> None:
        check_options(type(self), options)  # LionMuon would take its betas
        beta = check_beta("beta", beta)
        super().__init__(params, lr, (beta, beta), weight_decay, period, sign_lr_ratio, period_mode, spread, **options)
