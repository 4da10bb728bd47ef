"""MiMuon: Muon that steps by its momentum itself where that is too small to orthogonalize (arXiv 2605.19619)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.errors import UserError
from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_at_least_zero, check_new_weight, one_of
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import SCALES, Gate, MatrixUpdate

_HYPER = {
    "beta": check_new_weight,
    "gate": one_of(["frobenius", "singular_gap"]),
    "tau": check_at_least_zero,
    "raw_scale": check_at_least_zero,
    "scale": one_of(SCALES),
}


@rule("mimuon", hyper=_HYPER, shape=replace(POLAR, of_factor=None))
def mimuon(group: Group, step: int) -> MatrixUpdate:
    weights = (1 - group["beta"], group["beta"])
    return MatrixUpdate(
        blend=Blend(weights, weights),
        lr=group["lr"],
        decay=group["weight_decay"],
        scale=group["scale"],
        gate=Gate(figure=group["gate"], threshold=group["tau"], lr=group["lr"] * group["raw_scale"]),
    )


@register(
    rules="mimuon",
    step="Muon, the momentum itself where it is too small",
    moves="a norm; cut matrices where gates open",
    when="when momentum fades and Muon would amplify noise",
    paper="arXiv 2605.19619",
    claim="lower generalization error than Muon's (a bound)",
)
class MiMuon(ZeroOptimizer):
    """MiMuon for matrices, the aux rule for the rest.

    M <- b G + (1 - b) M; W <- W (1 - lr wd) - lr s polar(M) if the gate is open, else
    W <- W (1 - raw_lr wd) - raw_lr M.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: of the orthogonalized steps; a schedule of it moves raw_lr too.
        beta: b, the weight of the NEW gradient, in (0, 1].
        weight_decay: decoupled, with the step size that the step uses.
        gate: "frobenius" (ours) opens where ||M||_F >= tau, "singular_gap" (the paper's) where the smallest gap
            between positive singular values of M is, zeros of a rank-deficient M left out (an SVD of every matrix at
            every step, and all of them travel twice: for reference).
        tau: the threshold, in units of the gradient.
        raw_lr: of the steps by M itself; lr by default.
        scale: s, as for :class:`Muon`.

    Ours: s belongs to polar(M) alone. One gate a parameter: of a parameter that is several matrices, "frobenius"
    takes the root mean square of their norms and "singular_gap" the smallest gap. ``diagnostics`` logs the share of
    open gates.

    Keeps one fp32 value a parameter. Between ranks it moves what Muon moves, less where no gate of a partition is
    open, and for "frobenius" one sum a parameter tensor (8 bytes) in one all-reduce.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.05,
        weight_decay: float = 0.1,
        gate: str = "frobenius",
        tau: float = 1e-3,
        raw_lr: float | None = None,
        scale: str = "match_rms_adamw",
        **options: Unpack[MatrixOptions],
    ) -> None:
        lr = check_at_least_zero("lr", lr)
        raw = check_at_least_zero("raw_lr", lr if raw_lr is None else raw_lr)
        if raw and not lr:
            raise UserError("lr is 0 and raw_lr is not: write the peak lr and let a scheduler start it at 0")
        hyper = {
            "beta": beta,
            "gate": gate,
            "tau": tau,
            "raw_scale": raw / lr if lr else 1.0,
            "scale": scale,
        }
        super().__init__(params, rule="mimuon", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options))
