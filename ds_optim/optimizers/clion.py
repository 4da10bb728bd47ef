"""CLion: Lion whose sign gives way to the direction itself where that is small (arXiv 2604.14587)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from ds_optim.elementwise.sign_rules import count_from, gated_step, raw_step, smallest_nonzero
from ds_optim.elementwise.steps import sign_step
from ds_optim.optimizers.base import CommonOptions, ZeroOptimizer
from ds_optim.optimizers.checks import check_at_least_zero, check_betas, check_choice
from ds_optim.optimizers.registry import register
from ds_optim.optimizers.rules import Group, rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate, Piece, lion_blend
from ds_optim.sharding.layout import ParamSpec

_HYPER = {"betas": check_betas, "nu": check_at_least_zero}


@rule("clion_tensor", hyper=_HYPER)
def clion_tensor(group: Group, step: int) -> ParameterUpdate:
    blend, decay = lion_blend(group["betas"]), group["weight_decay"]

    def decide(spec: ParamSpec, least: Sequence[float], _: float) -> Decision:
        is_open = float(least[0] >= group["nu"])
        return Decision(lr=group["lr"], value=is_open, shown={"open gates": is_open})

    def apply(piece: Piece, chosen: Decision) -> None:
        step_with = sign_step if chosen.value else raw_step
        step_with(piece.p, piece.m, piece.g, blend=blend, lr=chosen.lr, decay=decay, scratch=piece.scratch)

    least = Measure(op="min", columns=1, partial=lambda p: [smallest_nonzero(p.m, p.g, blend, p.scratch)])
    return ParameterUpdate(measure=least, decide=decide, apply=apply, decay=decay, together=True)


@rule("clion_coordinate", hyper=_HYPER)
def clion_coordinate(group: Group, step: int) -> ParameterUpdate:
    blend, decay, nu = lion_blend(group["betas"]), group["weight_decay"], group["nu"]

    def decide(spec: ParamSpec, counts: Sequence[float], _: float) -> Decision:
        return Decision(lr=group["lr"], shown={"open gates": counts[0] / spec.whole_numel} if counts else {})

    def apply(piece: Piece, chosen: Decision) -> None:
        gated_step(piece.p, piece.m, piece.g, blend=blend, lr=chosen.lr, decay=decay, nu=nu, scratch=piece.scratch)

    # The step needs no sum; what it did is counted for the diagnostics alone.
    counted = Measure(op="sum", columns=1, partial=lambda p: [count_from(p.m, p.g, blend, nu, p.scratch)])
    measure = counted if group.get("diagnostics") else None
    return ParameterUpdate(measure=measure, decide=decide, apply=apply, decay=decay, together=True)


@register(
    rules={"": "clion_coordinate", 'gate: "tensor"': "clion_tensor"},
    step="Lion, the blend itself where it is below `nu`",
    moves='nothing; `gate: "tensor"` a minimum',
    when="when gradients near zero should not cause whole steps",
    paper="arXiv 2604.14587",
    claim="lower generalization error than Lion's (a bound)",
)
class CLion(ZeroOptimizer):
    """CLion, for every parameter.

    c = b1 m + (1 - b1) g;  theta <- theta (1 - lr wd) - lr h(c);  m <- b2 m + (1 - b2) g, with h(c) = sign(c) where
    the gate is open and c itself where it is not.

    Args:
        params: ``ds_optim.param_groups(model)``, named parameters, or parameters.
        lr: the size of each element's step where its gate is open.
        betas: (b1, b2).
        weight_decay: decoupled, on parameters with two or more dimensions (all with ``decay_1d``).
        nu: the threshold, in units of the gradient.
        gate: "coordinate" opens for each element with |c| >= nu; "tensor", the paper's algorithm, for a whole
            parameter whose smallest |c| that is not 0 reaches nu: that is all but never, and on a model of
            0.03M parameters the loss is higher for it (docs/evidence.md).

    ``diagnostics`` logs the share of open gates.

    Keeps one fp32 value a parameter; a step of gate "tensor" joins one minimum a parameter tensor (8 bytes) in one
    all-reduce, of "coordinate" nothing.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1.0,
        nu: float = 1e-6,
        gate: str = "coordinate",
        **options: Unpack[CommonOptions],
    ) -> None:
        kind = check_choice("gate", gate, ["tensor", "coordinate"])
        hyper = {"betas": betas, "nu": nu}
        super().__init__(
            params, rule=f"clion_{kind}", lr=lr, weight_decay=weight_decay, hyper=hyper, options=dict(options)
        )
