"""Who works on which matrix, agreed on by all ranks before the first step.

"auto" asks the hardware and costs are by the clock, so that ranks would choose differently: rank 0 chooses for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_optim.errors import UserError
from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers.alike import check_alike
from ds_optim.optimizers.costs import Costs, costs_of, measured
from ds_optim.optimizers.rules import FRACTION, RULES, Group
from ds_optim.optimizers.sharing import exchanges_of, share
from ds_optim.sharding.binding import Binding, Member
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.plan import ExchangePlan


def plan_exchanges(
    binding: Binding, groups: Sequence[Group], polar: PolarSpec, exchange: Mapping[str, Any], saved: Costs | None
) -> tuple[dict[int, Exchange], Costs | None]:
    """An exchange for each unit whose rule may ask for matrices, and the costs that owners were chosen by.

    Args:
        groups: of the units, in their order.
        saved: the costs of a checkpoint. None of them is measured anew, so that its plan is made again.

    Raises:
        RuntimeError: rank 0 could not plan; on every rank.
        UserError: plans differ all the same; on every rank.
    """
    plans = _unresolved(binding, groups, polar, exchange)
    choice = _guarded(binding, plans, exchange["costs"] == "measured", saved) if binding.peers.rank == 0 else None
    choice = binding.peers.gather_objects(choice)[0]
    if binding.tensor is not None:  # the first of all groups of data-parallel ranks chooses
        choice = binding.tensor.gather_objects(choice)[0]
    if isinstance(choice, str):
        raise RuntimeError(f"rank 0 could not plan the exchange of matrices: {choice}")
    plans = {n: replace(plan, polar=choice.polars[n], timed=choice.timed[n]) for n, plan in plans.items()}
    if exchange["share"]:
        plans = share(binding, plans, exchange["share"])
    exchanges = exchanges_of(binding, plans)
    digests = repr([(number, exchange.plan.digest()) for number, exchange in sorted(exchanges.items())])
    digest = hashlib.sha256(digests.encode()).hexdigest()[:12]
    for comm in (binding.peers, *([] if binding.tensor is None else [binding.tensor])):
        check_alike(comm.gather_objects({"plan of the exchange of matrices": digest}))
    return exchanges, choice.table


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What rank 0 chose: by unit, how to orthogonalize and what its matrices cost; and all costs, to be saved."""

    polars: dict[int, PolarSpec]
    timed: dict[int, dict[tuple[int, int], float] | None]
    table: Costs | None


def _guarded(binding: Binding, plans: Mapping[int, ExchangePlan], timed: bool, saved: Costs | None) -> _Choice | str:
    """The choice, or why there is none: the other ranks wait for an answer."""
    try:
        return _chosen(binding, plans, timed, saved)
    except Exception as problem:
        return f"{type(problem).__name__}: {' '.join(str(problem).split())}"


def _chosen(binding: Binding, plans: Mapping[int, ExchangePlan], timed: bool, saved: Costs | None) -> _Choice:
    device = binding.device
    weights = {number: binding.members[number][0].parameter.dtype for number in plans}
    plans = {n: replace(plan, polar=plan.polar.resolve(device, weights[n])) for n, plan in plans.items()}
    cut = [plan for plan in plans.values() if plan.cut]  # alone ask for owners
    table = measured(cut, device, saved) if timed and cut else None
    return _Choice(
        polars={number: plan.polar for number, plan in plans.items()},
        timed={number: costs_of(plan, device, table) if table is not None else None for number, plan in plans.items()},
        table=table,
    )


def _unresolved(
    binding: Binding, groups: Sequence[Group], polar: PolarSpec, exchange: Mapping[str, Any]
) -> dict[int, ExchangePlan]:
    """By unit, what is planned as the user wrote it."""
    shapes = {n: shape for n, group in enumerate(groups) if (shape := RULES[group["rule"]].shape) is not None}
    return {
        number: ExchangePlan(
            unit=binding.layout.units[number],
            views=_views_of(binding.members[number], groups[number]),
            shape=shape,
            polar=polar,
            bucket_mb=exchange["bucket_mb"],
            overlap=exchange["overlap"],
            stacked=binding.device.type != "cpu",
            fraction=groups[number].get(FRACTION, 1.0),
        )
        for number, shape in shapes.items()
    }


def _views_of(members: Sequence[Member], group: Group) -> dict[int, MatrixView]:
    """How each of a unit's parameters is seen as matrices, by its number.

    Raises:
        UserError: tensor parallelism cut one in a way that the rule cannot be right with.
    """
    views = {}
    for number, member in enumerate(members):
        assert member.view is not None, f"{member.spec.name} takes a matrix rule and has no view"
        sizes = () if member.spec.shard is None else member.spec.shard.sizes
        if sizes and FRACTION in group:
            raise UserError(
                f"{member.spec.name} is cut over tensor-parallel ranks, and {group['rule']} chooses among the rows of "
                "whole matrices: take another optimizer, or tensor parallel size 1"
            )
        if len(set(sizes)) > 1:
            raise UserError(
                f"{member.spec.name} is cut into unequal parts {list(sizes)} over tensor-parallel ranks, whose ZeRO "
                "partitions then have other borders: take a tensor parallel size that divides it (its heads, for "
                "queries, keys and values), or let the aux rule have it by matrix_exclude"
            )
        views[number] = member.view
    return views
