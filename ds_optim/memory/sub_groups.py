"""Work of a step's exchanges where ZeRO-3 steps sub-groups one after the other, and sizes of these that suit it better.

DeepSpeed calls the optimizer once a sub-group, with its partition alone, and takes the new weights before the next: an
exchange ends before the next one begins, and each lasts as long as its busiest rank. So a step lasts the sum of the
longest, and no owner of one sub-group makes up for another's. What does is a size that leaves equal sub-groups: a last
one of a few matrices keeps a few ranks busy and all others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_optim.memory.estimate import layout_of
from ds_optim.memory.estimate_exchange import exchange_plans
from ds_optim.memory.estimate_optimizers import OptimizerPlan
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.sharding.plan import ExchangePlan

_DIGITS = 4
_WORTH = 0.01


def balance(plans: Sequence[ExchangePlan], ranks: int) -> tuple[float, float]:
    """Of one exchange after the other: the time of all over max(mean work of a rank, largest matrix), both of matrices
    that nobody shares, and the share of all ranks' time that is spent waiting for the busiest one; (1.0, 0.0) where
    there is no work."""
    longest = sum(max(plan.loads) for plan in plans)
    if not longest:
        return 1.0, 0.0
    mean, of_whole = (sum(sum(plan.loads) for plan in some) / ranks for some in (plans, [p.of_whole for p in plans]))
    largest = max(cost for plan in plans for cost in plan.of_whole.costs.values())
    return longest / max(of_whole, largest), 1 - mean / longest


def better_size(
    plans: Sequence[ExchangePlan], optimizer: OptimizerPlan, zero: ZeroSettings, ranks_per_node: int
) -> tuple[int, float] | None:
    """A ``sub_group_size`` that is no larger than it is, so that no more memory is held, and the balance with it.

    None at other stages, with one sub-group, and where none is better by a hundredth.
    """
    if zero.stage != 3 or len(plans) < 2:
        return None
    held = sum(plan.unit.params[param].numel for plan in plans for param in plan.views) / zero.ranks
    best = balance(plans, zero.ranks)[0] - _WORTH, 0
    for count in range(len(plans), 2 * len(plans) + 1):
        share = int(held / count)
        size = share - share % 10 ** max(0, len(str(share)) - _DIGITS)  # a little less closes at the same matrix
        if not 0 < size <= zero.sub_group_size:
            continue
        there = replace(zero, sub_group_size=size)
        of_size = exchange_plans(layout_of(optimizer, there).units, optimizer, there, ranks_per_node)
        found = balance(list(of_size), zero.ranks)[0]
        if found < best[0] - (_WORTH if best[1] else 0):
            best = found, size
    return (best[1], best[0]) if best[1] else None
