"""Dion2: Muon of some rows of each matrix a step, while the others gather momentum (Ahn, Amsel, Langford 2025)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_beta, check_fraction, one_of
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import FRACTION, WIDE_MEAN, Group, rule
from ds_optim.optimizers.updates import SCALES, RowsUpdate

_SUM = Blend((1.0, 1.0), (1.0, 1.0))


@rule(
    "dion2",
    hyper={FRACTION: check_fraction, "momentum": check_beta, "scale": one_of(SCALES)},
    buffers=(replace(WIDE_MEAN, means="the sum of gradients that no step has taken"),),
    shape=replace(POLAR, name="polar, of some rows", of_factor=None),
)
def dion2(group: Group, step: int) -> RowsUpdate:
    return RowsUpdate(
        blend=_SUM,
        lr=group["lr"],
        decay=group["weight_decay"],
        scale=group["scale"],
        fraction=group[FRACTION],
        kept=group["momentum"],
    )


@register(
    rules="dion2",
    step="some rows of the summed gradients, orthogonalized",
    moves="a fraction of cut matrices, and 8 bytes a row of them",
    when="for Muon where orthogonalization or the wire is what costs",
    paper="Ahn et al. 2025, arXiv 2512.16928",
    claim="close to Muon with a quarter of the rows, at 300M and 1B",
)
class Dion2(ZeroOptimizer):
    """Dion2 for matrices, the aux rule for the rest.

    M <- M + G;  K: the ceil(fraction m) rows of M with the largest sums of magnitudes;  W <- W (1 - lr wd);
    W_K <- W_K - lr s polar(M_K);  M_K <- mu M_K, for each (m, n) matrix of the view.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: of the matrices.
        fraction: of the rows of each matrix, above 0; what a step orthogonalizes.
        momentum: mu, of rows that a step has taken; what it has not taken stays whole, and comes later.
        scale: s of the whole (m, n), as for :class:`Muon`; "unit_rms" as in the authors' code.
        weight_decay: decoupled, of all rows.

    Defaults are those of the authors' code, github.com/microsoft/dion, whose norm of a row is that sum too. Ours: rows
    (fan-out) are chosen, whatever the side that is shorter, and over the whole matrix, wherever ZeRO cuts it; the
    code chooses by shards. Where fused parts take turns (GPT-NeoX), the same fraction of each turn is chosen; gates and
    ups that do so row by row (gpt-oss) are one matrix here. Of rows of one sum the first ones are taken. With
    fraction 1 this is Muon without nesterov, and with momentum that is not divided by 1 - mu, which orthogonalization
    does not see.

    Keeps one fp32 value a parameter. Beside ZeRO's own a step moves ``fraction`` of what Muon moves (as many rows are
    chosen everywhere; whose, differs from step to step), and joins 8 bytes a row of cut matrices in one all-reduce.
    Planned scratch is Muon's, since all rows that are chosen may lie on one rank.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        fraction: float = 0.25,
        momentum: float = 0.95,
        scale: str = "unit_rms",
        weight_decay: float = 0.01,
        **options: Unpack[MatrixOptions],
    ) -> None:
        hyper = {"fraction": fraction, "momentum": momentum, "scale": scale}
        super().__init__(params, rule="dion2", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options))
