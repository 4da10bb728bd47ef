"""SpectralLion: the sign of Lion's direction, its columns or those of its gradient normalized in a spectral basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ds_optim.matrix.shapes import POLAR, SIGN_POLAR, WEIGHT_BASIS
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas, check_choice
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import MatrixSignUpdate, MatrixUpdate, lion_blend


@rule("spectral_lion_momentum", hyper={"betas": check_betas}, shape=SIGN_POLAR)
@rule("spectral_lion_weight", hyper={"betas": check_betas}, shape=WEIGHT_BASIS)
def spectral_lion(group: Group, step: int) -> MatrixUpdate:
    return MatrixUpdate(blend=lion_blend(group["betas"]), lr=group["lr"], decay=group["weight_decay"], scale=None)


@rule("spectral_lion_gradient", hyper={"betas": check_betas}, shape=POLAR)
def spectral_lion_of_gradients(group: Group, step: int) -> MatrixSignUpdate:
    return MatrixSignUpdate(blend=lion_blend(group["betas"]), lr=group["lr"], decay=group["weight_decay"])


@register(
    rules={
        "": "spectral_lion_momentum",
        'basis: "weight"': "spectral_lion_weight",
        'basis: "gradient"': "spectral_lion_gradient",
    },
    step="sign of Lion's direction, evened out in a spectral basis",
    moves='cut matrices, with `basis: "weight"` fp32 weights too; signs back (`"gradient"`: factors)',
    when='to study it: an eigenproblem (`"momentum"`: an SVD) a matrix and step',
    claim="15% slower",
)
class SpectralLion(ZeroOptimizer):
    """SpectralLion for matrices, the aux rule for the rest.

    C = b1 M + (1 - b1) G;  W <- W (1 - lr wd) - lr sign(F(C));  M <- b2 M + (1 - b2) G. The source says "SVD of each
    W" in its method, "momentum" in its introduction, and in its abstract that the gradient goes through the SVD and
    what comes of it into Lion; all three are here.

    basis "weight": of W, oriented tall, V = the right singular vectors; R = C V, each column divided by its norm
    (+ 1e-8); F = R V'. The left vectors cancel. basis "momentum": of C itself, where dividing the columns gives the
    polar factor: F = polar(C). basis "gradient": of G itself, before Lion: G' = polar(G), C = b1 M + (1 - b1) G',
    W <- W (1 - lr wd) - lr sign(C), M <- b2 M + (1 - b2) G'. That rule is ours in full, made of the abstract's sentence
    and the momentum basis' way of dividing columns: every gradient counts alike, however large it is, and momentum
    is an average of polar factors.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: the size of each element's step.
        betas: (b1, b2).
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).
        basis: "momentum", "weight" or "gradient". The default ended below the other two on a model of 0.03M
            parameters, each with its own best rate (docs/evidence.md).
        polar: as for all matrix rules; here the method is "svd" unless said otherwise, and its dtype, that of the
            directions or gradients that travel, is that of the model's weights: bfloat16 for 16-bit ones, else float32.

    Ours: the singular vectors are computed anew at each step, so that no buffer holds them.

    Keeps one fp32 value a parameter. At stage 3 a step moves, for each element that another rank owns, 2 bytes of
    direction to the owner (4 in fp32), with basis "weight" 4 bytes of master weight as well, and 1 byte, a sign, back;
    with basis "gradient" as much of the polar factor comes back as went out of the gradient, and momentum moves then.
    At stages 1 and 2 only matrices that a border cuts travel.
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
        kind = check_choice("basis", basis, ["weight", "momentum", "gradient"])
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
