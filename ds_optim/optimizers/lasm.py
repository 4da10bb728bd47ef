"""LASM: signs of a momentum that weighs each gradient by how far it is from what was expected, scaled by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.moments import lasm_difference, lasm_element_step
from ds_optim.elementwise.steps import sign_step
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_betas, check_choice
from ds_optim.optimizers.layer_scales import check_all_match, check_layer_scales, layer_scale
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import MOMENTUM, PARAMETER, SCALARS, SECOND_MOMENT, Buffer, Group, rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate, Piece
from ds_optim.sharding.layout import ParamSpec

LAYER_SCALES = (
    # A module's name, and not that of the norm behind it ("post_attention_layernorm").
    (r"(attn|attention)\.", 1.5),
    (r"mlp\.", 1.0),
    # A tied head bears the embedding's name; the untied ones of GPT-NeoX and others ("embed_out") are heads.
    (r"embed(?!_out)|\bwte\b|\bwpe\b", 0.5),
)
"""For the names of Llama, Qwen and GPT-2; 1.0 for all others."""

_HYPER = {"betas": check_betas, "layer_scales": check_layer_scales}
_MEAN = Buffer(MOMENTUM, means="a mean of damped gradients", narrow=True)
_SURPRISE = "a mean of squared surprises"


@rule("lasm", hyper=_HYPER, buffers=(_MEAN, Buffer(SCALARS, PARAMETER, _SURPRISE)))
def lasm(group: Group, step: int) -> ParameterUpdate:
    b1, b2 = group["betas"]

    def decide(spec: ParamSpec, sums: Sequence[float], v: float) -> Decision:
        v = b2 * v + (1 - b2) * sums[0] / spec.whole_numel
        sigma = 1 / (1 + math.sqrt(v))
        return Decision(lr=group["lr"], value=sigma, scalar=v, shown={"min sigma": sigma})

    def apply(piece: Piece, chosen: Decision) -> None:
        weights = (b1, (1 - b1) * chosen.value)
        sign_step(
            piece.p,
            piece.m,
            piece.g,
            blend=Blend(weights, weights),
            lr=chosen.lr,
            decay=group["weight_decay"],
            scale=layer_scale(group["layer_scales"], piece.spec.name),
            scratch=piece.scratch,
        )

    surprise = Measure(op="sum", columns=1, partial=lambda p: [lasm_difference(p.m, p.g, p.scratch)])
    return ParameterUpdate(measure=surprise, decide=decide, apply=apply, decay=group["weight_decay"], together=True)


@rule("lasm_element", hyper=_HYPER, buffers=(replace(_MEAN, narrow=False), Buffer(SECOND_MOMENT, means=_SURPRISE)))
def lasm_element(group: Group, step: int) -> ParameterUpdate:
    def apply(piece: Piece, chosen: Decision) -> None:
        lasm_element_step(
            piece.p,
            piece.wide_m,
            piece.v,
            piece.g,
            betas=group["betas"],
            lr=chosen.lr,
            decay=group["weight_decay"],
            scale=layer_scale(group["layer_scales"], piece.spec.name),
            scratch=piece.scratch,
        )

    return ParameterUpdate(
        decide=lambda spec, _, __: Decision(lr=group["lr"]), apply=apply, decay=group["weight_decay"], together=True
    )


@register(
    rules={"": "lasm", 'variance: "element"': "lasm_element"},
    step="sign of a momentum that trusts unexpected gradients less, scaled by layer",
    moves='a sum; `"element"` nothing',
    when="for step sizes by kind of layer",
    claim="5% slower than AdamW",
)
class LASM(ZeroOptimizer):
    """LASM, for every parameter.

    v <- b2 v + (1 - b2) (g - m)^2;  sigma = 1 / (1 + sqrt(v));  m <- b1 m + (1 - b1) g sigma;
    theta <- theta (1 - lr wd) - lr alpha sign(m).

    Args:
        params: ``ds_optim.param_groups(model)``, or named parameters.
        lr: the size of each element's step where alpha is 1.
        betas: (b1, b2).
        weight_decay: decoupled, without alpha, on parameters with two or more dimensions (all with ``decay_1d``).
        variance: "tensor" keeps one v for each parameter, from the mean of (g - m)^2 over it; "element" is the
            literal rule with a second buffer.
        layer_scales: {pattern: alpha}; the first pattern found in a parameter's name counts, and alpha is 1 where
            none is. By default attention 1.5, MLP 1.0, embedding (and a head tied to it) 0.5, as in the source. On a
            model of 0.03M parameters these raised the loss, and neither sigma nor its variance changed it
            (docs/evidence.md).

    variance="tensor" is ours. The second buffer of "element" holds sqrt(v), which has the gradient's range.
    sigma is within 1e-3 of 1 while gradients stay below 1e-3 or so; ``diagnostics`` logs the smallest ("min sigma").

    Keeps one fp32 value a parameter ("element": two) and, with "tensor", one number a parameter tensor, for which a
    step joins one sum a tensor (8 bytes) in one all-reduce.
    """

    by_name = True

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        variance: str = "tensor",
        layer_scales: Mapping[str, float] | Sequence[Sequence[Any]] | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        element = check_choice("variance", variance, ["tensor", "element"]) == "element"
        super().__init__(
            params,
            rule="lasm_element" if element else "lasm",
            lr=lr,
            weight_decay=weight_decay,
            hyper={"betas": betas, "layer_scales": LAYER_SCALES if layer_scales is None else layer_scales},
            options=dict(options),
        )
        if layer_scales is not None:
            check_all_match(check_layer_scales("layer_scales", layer_scales), chain(*self.members))
