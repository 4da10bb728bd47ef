"""Steps that know whole parameters: what each of them measures, what is decided, and the step of its slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor

from ds_optim.elementwise import fused
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.rules import Rule
from ds_optim.optimizers.updates import Decision, Measure, ParameterUpdate
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.sums import reduce_parameters, rounded_once

Decisions = Mapping[int, Decision]
"""By parameter of the unit; none for parameters without a gradient."""


def step_parameters(local: Local, rule: Rule, update: ParameterUpdate) -> Decisions:
    """Measure, decide and step every parameter of a unit; the scalars that the rule keeps move on."""
    alone = not update.together
    rows = measured(local, update.measure, alone=alone) if update.measure else [[] for _ in local.unit.params]
    decisions: dict[int, Decision] = {}
    for param in local.params():
        spec, row = local.unit.params[param], rows[param]
        kept = local.scalars(param) if rule.scalar else {}
        decisions[param] = update.decide(spec, row, kept.get(spec.name, 0.0))
        if rule.scalar:
            scalar = decisions[param].scalar
            assert scalar is not None
            kept[spec.name] = scalar
    with nullcontext() if alone else fused.together():
        for held in local.slices():
            for piece in map(local.piece, local.parts(held)):
                with local.decaying(piece.p, decisions[held.param].lr, alone=alone):
                    update.apply(piece, decisions[held.param])
    return decisions


def measured(local: Local, measure: Measure, *, alone: bool = False) -> list[list[float]]:
    """The numbers of each parameter of the unit, joined over its slices on all ranks and rounded once.

    alone: one slice is measured before the next is looked at.
    What tensor parallelism cut is joined over its shards; what each of its ranks holds whole is counted once.
    """

    def partial(held: Slice) -> Sequence[Tensor]:
        return () if held.tensor in local.absent else measure.partial(local.piece(held))

    device = local.comm.device(local.tensors[0].device)
    totals = reduce_parameters(
        local.unit, local.comm, partial, columns=measure.columns, op=measure.op, device=device, together=not alone
    )
    cut = [param for param, spec in enumerate(local.unit.params) if spec.shard is not None]
    if local.tensor is not None and cut:
        totals[cut] = local.tensor.all_reduce(totals[cut], measure.op)
    return [[rounded_once(value) for value in row] for row in totals.tolist()]
