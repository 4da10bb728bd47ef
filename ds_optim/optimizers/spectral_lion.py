"""SpectralLion: the sign of Lion's direction after its columns were normalized in a spectral basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ds_optim.matrix.shapes import SIGN_POLAR, WEIGHT_BASIS
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas, check_choice
from ds_optim.optimizers.rules import Group, MatrixUpdate, lion_blend, rule


@rule("spectral_lion_momentum", hyper={"betas": check_betas}, shape=SIGN_POLAR)
@rule("spectral_lion_weight", hyper={"betas": check_betas}, shape=WEIGHT_BASIS)
def spectral_lion(group: Group, step: int) -> MatrixUpdate:
    return MatrixUpdate(blend=lion_blend(group["betas"]), lr=group["lr"], decay=group["weight_decay"], scale=None)


class SpectralLion(ZeroOptimizer):
    """SpectralLion for matrices, the aux rule for the rest.

    C = b1 M + (1 - b1) G;  W <- W (1 - lr wd) - lr sign(F(C));  M <- b2 M + (1 - b2) G. The source says "SVD of each
    W" in its method and "momentum" in its introduction; both are here.

    basis "weight": of W, oriented tall, V = the right singular vectors; R = C V, each column divided by its norm
    (+ 1e-8); F = R V'. The left vectors cancel. basis "momentum": of C itself, where dividing the columns gives the
    polar factor: F = polar(C).

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: the size of each element's step.
        betas: (b1, b2).
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).
        basis: "momentum" or "weight". The default is the one whose losses were lower (README, "Optimizers").
        polar: as for all matrix rules; here the method is "svd" unless said otherwise, and its dtype, that of the
            directions that travel, is that of the model's weights: bfloat16 for 16-bit ones, else float32.

    Ours: the singular vectors are computed anew at each step, so that no buffer holds them.

    Keeps one fp32 value a parameter. At stage 3 a step moves, for each element that another rank owns, 2 bytes of
    direction to the owner (4 in fp32), with basis "weight" 4 bytes of master weight as well, and 1 byte, a sign, back;
    at stages 1 and 2 only for matrices that a border cuts.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        basis: str = "momentum",
        **options: Unpack[MatrixOptions],
    ) -> None:
        kind = check_choice("basis", basis, ["weight", "momentum"])
        polar = options.get("polar", {})
        options["polar"] = {"method": "svd", **polar} if isinstance(polar, Mapping) else polar
        super().__init__(
            params,
            rule=f"spectral_lion_{kind}",
            lr=lr,
            weight_decay=weight_decay,
            hyper={"betas": betas},
            options=dict(options),
        )
