"""An exchange of matrices on a cluster that is not there: bytes inside and between nodes, scratch, balance of owners.

The layout and the plan are those that a run makes, without weights; nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_optim.memory.estimate import layout_of
from ds_optim.memory.estimate_exchange import exchange_plans, sampled_ranks
from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_optimizers import OptimizerPlan
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.sub_groups import balance, better_size
from ds_optim.sharding.held import peak_scratch
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shares import shared_by


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One exchange of all matrices, at one stage and number of ranks.

    Attributes:
        matrix_elements: of all matrices. bytes_an_element: there and back together.
        mean_bytes, most_bytes: that a rank sends, over the ranks looked at.
        inside, between: of ``mean_bytes``, what stays on a node and what leaves it.
        scratch: the most bytes that any rank holds for it.
        jobs: matrices by rank, the mean. makespan: the busiest rank's modelled work over max(mean, largest job), of
        exchanges that follow each other the sum of each one's busiest.
        idle: the share of ranks' time that is spent waiting for the busiest one.
        better_size, better_makespan: a ``sub_group_size`` of stage 3 that balances better, and how; None without.
        shared: matrices that ranks of a node share. shared_makespan: with ``"share": "auto"`` where the optimizer has
        none and it pays; None elsewhere. What ranks that share matrices send each other is in their work.
    """

    stage: int
    ranks: int
    matrix_elements: int
    bytes_an_element: int
    mean_bytes: float
    most_bytes: int
    inside: float
    between: float
    scratch: int
    jobs: float
    makespan: float
    idle: float
    better_size: int | None = None
    better_makespan: float | None = None
    shared: int = 0
    shared_makespan: float | None = None

    @property
    def formula(self) -> float:
        """Bytes a rank sends at stage 3 by 2 (N-1) / N^2 elements: each matrix element goes there and comes back."""
        return (self.ranks - 1) / self.ranks**2 * self.matrix_elements * self.bytes_an_element


def simulate(model: ModelShape, optimizer: OptimizerPlan, zero: ZeroSettings, ranks_per_node: int = 8) -> Simulated:
    """The exchange that a step with matrices makes.

    Args:
        ranks_per_node: rank r is on node r // ranks_per_node.
    """
    plans = list(exchange_plans(layout_of(optimizer, zero).units, optimizer, zero, ranks_per_node))
    sampled = sampled_ranks(zero.ranks)
    sent = [(0, 0)] * len(sampled)
    scratch = 0
    jobs = elements = 0
    for plan in plans:
        jobs += len(plan.of_whole.views)
        elements += sum(plan.unit.params[param].numel for param in plan.of_whole.views)
        for place, rank in enumerate(sampled):
            inside, between = _sent(plan, rank, ranks_per_node)
            sent[place] = sent[place][0] + inside, sent[place][1] + between
            scratch = max(scratch, peak_scratch(plan, rank))
    makespan, idle = balance(plans, zero.ranks)
    better = better_size(plans, optimizer, zero, ranks_per_node)
    auto = plans if optimizer.share else [shared_by(plan, "auto", min(ranks_per_node, zero.ranks)) for plan in plans]
    totals = [inside + between for inside, between in sent]
    return Simulated(
        stage=zero.stage,
        ranks=zero.ranks,
        matrix_elements=elements,
        bytes_an_element=max((plan.element_bytes for plan in plans), default=0),
        mean_bytes=sum(totals) / len(totals),
        most_bytes=max(totals),
        inside=sum(inside for inside, _ in sent) / len(sent),
        between=sum(between for _, between in sent) / len(sent),
        scratch=scratch,
        jobs=jobs / zero.ranks,
        makespan=makespan,
        idle=idle,
        better_size=None if better is None else better[0],
        better_makespan=None if better is None else better[1],
        shared=sum(plan.shared for plan in plans),
        shared_makespan=None if auto == plans else balance(auto, zero.ranks)[0],
    )


def _sent(plan: ExchangePlan, rank: int, ranks_per_node: int) -> tuple[int, int]:
    """Bytes that a rank sends inside its node, and to others."""
    inside = between = 0
    node = rank // ranks_per_node
    for bucket in plan.buckets:
        by_peer = plan.bytes_by_peer(bucket, rank)
        near = sum(by_peer[node * ranks_per_node : (node + 1) * ranks_per_node])
        inside += near
        between += sum(by_peer) - near
    return inside, between
