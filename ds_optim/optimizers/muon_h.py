"""MuonH: Muon on a sphere, where each matrix keeps its norm (hyperball updates, Wen et al. 2025)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers.base import MatrixOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_beta, check_bool
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import MatrixUpdate, average

logger = logging.getLogger(__name__)


def _scratch(m: int, n: int, spec: PolarSpec) -> int:
    return max(POLAR.scratch(m, n, spec), 2 * 4 * m * n)  # the factor in fp32, and weights by it


@rule(
    "muon_h",
    hyper={"momentum": check_beta, "nesterov": check_bool},
    shape=replace(POLAR, name="polar, on a sphere", weights=True, scratch=_scratch, of_factor=None),
    decoupled=False,
)
def muon_h(group: Group, step: int) -> MatrixUpdate:
    mu, lr = group["momentum"], group["lr"]
    blend = average(mu)
    if group["nesterov"]:
        blend = Blend((mu * mu, 1 - mu * mu), blend.momentum)

    def finish(factors: Tensor, weights: Tensor | None, rows: Tensor | None) -> None:
        assert weights is not None
        norms = _norms(weights)
        if step == 0 and not bool((norms > 0).all()):
            logger.warning("MuonH: a matrix of zeros has no norm to keep and stands still: initialize it")
        factors.copy_(on_sphere(factors.float(), weights, norms, lr))

    return MatrixUpdate(blend=blend, lr=lr, decay=0.0, scale=None, finish=finish)


def on_sphere(u: Tensor, w: Tensor, norms: Tensor, lr: float) -> Tensor:
    """The D with w - lr D = R (w - lr R u/||u||) / ||w - lr R u/||u|| ||, R = ||w||: u, w (B, m, n), norms (B, 1, 1).

    With c = <w, u> / (R ||u||) and a = 1 / sqrt(1 - 2 lr c + lr^2) that is D = w (1 - a) / lr + a R u/||u||, where
    1 - a comes from expm1 and log1p: nothing cancels for a small lr, and D is finite where lr is 0. It is 0 for u = 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    length = _norms(u)
    unit = u.div_(length.clamp(min=tiny))
    if lr == 0.0:
        return unit.mul_(norms)
    cosine = (w * unit).sum(dim=(-2, -1), keepdim=True) / norms.clamp(min=tiny)
    turned = (length > 0).to(cosine.dtype)
    shrunk = torch.expm1(-0.5 * torch.log1p(lr * (lr * turned - 2 * cosine)))  # a - 1
    return unit.mul_((shrunk + 1) * norms).sub_(w * (shrunk / lr))


def _norms(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)


@register(
    rules="muon_h",
    step="Muon on the sphere of each matrix's norm",
    moves="cut matrices, and their fp32 weights",
    when="to need no weight decay, and rates that go from width to width",
    paper="Wen et al. 2025, hyperball optimization",
)
class MuonH(ZeroOptimizer):
    """MuonH for matrices, the aux rule for the rest.

    M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G if nesterov else M;  R = ||W||_F;  V = R polar(U) / ||polar(U)||_F;
    W <- R (W - lr V) / ||W - lr V||_F, for each matrix of the view.

    Args:
        params: ``ds_optim.param_groups(model)``.
        lr: of the matrices, in units of their norm: the tangent of the angle by which one turns, at most.
        momentum: mu.
        nesterov: look one gradient ahead.
        weight_decay: of what is no matrix, whose norm nothing else keeps; ``aux_weight_decay`` says the same.

    Ours: R is the norm that the matrix has, and not one kept from the start; in fp32 the two part by a rounding of
    the norm a step, without direction. A matrix of zeros stands still, and its owner says so at the first step.

    Keeps one fp32 value a parameter. Weights travel to a matrix's owner in fp32 beside the direction, so that at
    stage 3 a step moves twice the bytes that Muon moves in bfloat16.
    """

    has_aux = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        **options: Unpack[MatrixOptions],
    ) -> None:
        hyper = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(params, rule="muon_h", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options))
