"""The plan of an exchange: which rank works on which matrix, in which bucket, and what travels for it.

A plan is made from a :class:`Unit` alone. Every rank computes the same one, a simulator can compute that
of a cluster which is not there, and one hash tells whether two ranks mean the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.owners import assign_owners, makespan_ratio

Cost = Callable[[MatrixView], float]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A batch of cut matrices that travel together: ``owned[r]`` are the parameters that rank r works on."""

    owned: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """Who works on which matrix of ``unit``.

    ``whole[r]`` are batches of parameters that lie whole on rank r and never travel; ``buckets`` those
    that do, the same list on every rank. Batches hold one view only, so that they can be stacked.
    ``bucket_elements`` bounds what a rank owns in one bucket, ``batch_elements`` what is in a batch; a larger matrix
    has one to itself.
    """

    unit: Unit
    views: Mapping[int, MatrixView]
    whole: tuple[tuple[tuple[int, ...], ...], ...]
    buckets: tuple[Bucket, ...]
    bucket_elements: int
    batch_elements: int
    costs: Mapping[int, float]

    def sent_counts(self, bucket: Bucket, rank: int) -> list[int]:
        """Elements that ``rank`` sends to each owner; what it owns itself stays where it is."""
        return [
            0 if owner == rank else sum(self._held(param, rank) for param in params)
            for owner, params in enumerate(bucket.owned)
        ]

    def received_counts(self, bucket: Bucket, rank: int) -> list[int]:
        """Elements that ``rank``, as an owner, receives from each rank."""
        return [
            0 if source == rank else sum(self._held(param, source) for param in bucket.owned[rank])
            for source in range(self.unit.world_size)
        ]

    def _held(self, param: int, rank: int) -> int:
        held = self.unit.slice_of(param, rank)
        return held.numel if held is not None else 0

    def traffic(self, rank: int) -> int:
        """Elements that ``rank`` sends in one exchange: its slices out, and its results back."""
        return self.slices_sent(rank) + self.results_sent(rank)

    def slices_sent(self, rank: int) -> int:
        """Elements of its slices that ``rank`` sends to their owners."""
        return sum(sum(self.sent_counts(bucket, rank)) for bucket in self.buckets)

    def results_sent(self, rank: int) -> int:
        """Elements of results that ``rank``, as an owner, sends back."""
        return sum(sum(self.received_counts(bucket, rank)) for bucket in self.buckets)

    @cached_property
    def loads(self) -> list[float]:
        """Each rank's modelled work."""
        found = [sum(self.costs[p] for batch in batches for p in batch) for batches in self.whole]
        for bucket in self.buckets:
            for rank, params in enumerate(bucket.owned):
                found[rank] += sum(self.costs[p] for p in params)
        return found

    @cached_property
    def makespan(self) -> float:
        """The busiest rank's modelled work over the best that any assignment could reach."""
        return makespan_ratio(self.loads, [self.costs[p] for bucket in self.buckets for o in bucket.owned for p in o])

    def digest(self) -> str:
        """A hash that two ranks share only if they will post the same messages."""
        text = repr((self.unit, sorted(self.views.items()), self.whole, self.buckets))
        return hashlib.sha256(text.encode()).hexdigest()


def plan_exchange(
    unit: Unit,
    views: Mapping[int, MatrixView],
    *,
    cost: Cost,
    bucket_elements: int,
    batch_elements: int | None = None,
) -> ExchangePlan:
    """Plan the exchange of the matrices of ``unit``.

    Args:
        views: how each parameter (by its number in the unit) is seen as matrices.
        cost: the modelled or measured cost of a view's matrices; only ratios matter.
        bucket_elements: bound on the elements that a rank owns in one bucket.
        batch_elements: bound on those of a batch of matrices that lie whole on a rank; the same where None.
    """
    batch_elements = batch_elements or bucket_elements
    costs = {param: cost(view) for param, view in views.items()}
    whole: list[list[int]] = [[] for _ in range(unit.world_size)]
    cut: list[int] = []
    for param in views:
        holders = unit.holders(param)
        if len(holders) == 1:
            whole[holders[0][0]].append(param)
        else:
            cut.append(param)
    loads = [sum(costs[p] for p in params) for params in whole]
    owners = assign_owners([costs[p] for p in cut], loads)
    owned: list[list[int]] = [[] for _ in range(unit.world_size)]
    for param, owner in zip(cut, owners, strict=True):
        owned[owner].append(param)

    def batches(params: Sequence[int], stackable: bool) -> list[tuple[int, ...]]:
        ordered = sorted(params, key=lambda p: (-costs[p], repr(views[p]), p))
        return _fill_buckets(unit, ordered, views, batch_elements if stackable else bucket_elements, stackable)

    queues = [batches(params, stackable=False) for params in owned]
    buckets = [
        Bucket(owned=tuple(queue[k] if k < len(queue) else () for queue in queues))
        for k in range(max(map(len, queues)))
    ]
    return ExchangePlan(
        unit=unit,
        views=dict(views),
        whole=tuple(tuple(batches(params, stackable=True)) for params in whole),
        buckets=tuple(buckets),
        bucket_elements=bucket_elements,
        batch_elements=batch_elements,
        costs=costs,
    )


def _fill_buckets(
    unit: Unit, ordered: Sequence[int], views: Mapping[int, MatrixView], bound: int, stackable: bool
) -> list[tuple[int, ...]]:
    """Cut a queue of parameters into runs of at most ``bound`` elements (or one parameter)."""
    runs: list[list[int]] = []
    held = 0
    for param in ordered:
        numel = unit.params[param].numel
        mixed = stackable and bool(runs) and views[runs[-1][0]] != views[param]
        if not runs or mixed or held + numel > bound:
            runs.append([])
            held = 0
        runs[-1].append(param)
        held += numel
    return [tuple(run) for run in runs]
