"""The exchanges of an optimizer's matrices, as a step plans them where it counts operations: nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ds_optim.memory.estimate_optimizers import OptimizerPlan
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shares import shared_by

RANKS_PER_NODE = 8
#: Ranks that are looked at; of more, so many spread evenly, as neighbours do alike.
_SAMPLED_RANKS = 64


def exchange_plans(
    units: Iterable[Unit], optimizer: OptimizerPlan, zero: ZeroSettings, ranks_per_node: int = RANKS_PER_NODE
) -> Iterator[ExchangePlan]:
    """Of each unit that holds matrices; at most ``ranks_per_node`` share one."""
    for unit in units:
        group = optimizer.groups[unit.group]
        by_name = {parameter.name: parameter.view for parameter in group.parameters}
        views = {number: view for number, spec in enumerate(unit.params) if (view := by_name[spec.name]) is not None}
        if group.shape is not None and views:
            plan = ExchangePlan(
                unit=unit,
                views=views,
                shape=group.shape,
                polar=optimizer.polar,
                bucket_mb=optimizer.bucket_mb,
                overlap=optimizer.overlap,
                stacked=zero.device != "cpu",
                fraction=group.fraction,
            )
            yield shared_by(plan, optimizer.share, min(ranks_per_node, zero.ranks))


def sampled_ranks(ranks: int) -> range:
    """Those that stand for all."""
    return range(0, ranks, max(1, -(-ranks // _SAMPLED_RANKS)))
