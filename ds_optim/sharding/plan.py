"""The plan of an exchange: which rank works on which matrix, in which bucket, and what travels; held.py: what it holds.

A plan is made from a :class:`Unit` and settings alone. Every rank, the estimate and a simulator of a cluster which is
not there compute the same one where operations are counted, and one hash tells whether two ranks mean the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import ELEMENTS, Part, Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.owners import assign_owners, in_runs, makespan_ratio, nearest_owners
from ds_optim.sharding.working import Working

_MIB = 1 << 20
#: Elements that a rank sends and receives for each that it owns in a bucket. "each": it receives its own matrices and
#: sends as many. "flat": of its partition the first and the last matrix may be cut, and both be others'.
_MOVED = {"each": 2, "flat": 3, "none": 0}
#: Buckets that an overlapped exchange is cut into where each then holds so many elements: smaller messages cost more
#: in latency than they hide.
_BUCKETS, _LEAST_BUCKET = 4, 1 << 18


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A batch of cut matrices that travel together: ``owned[r]`` are the parameters that rank r works on."""

    owned: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """Who works on which matrix of ``unit``, and all that follows from it.

    views: how each parameter (by its number in the unit) is seen as matrices.
    shape: what owners make of a matrix. polar: resolved, where anything is asked of the plan.
    bucket_mb: MiB that the exchange may hold at once, unless one matrix asks for more. overlap: messages travel while
    matrices are worked on. stacked: equal matrices are worked on as one batch, as on CUDA, not one by one, as on a CPU.
    timed: measured costs, (m, n) -> milliseconds of a matrix; operations are counted where None.
    fraction: of each matrix's rows, what a step takes; which, no plan knows. What travels is counted as if every rank
    held an equal part of those, what is held as if each time one rank held all that it can.
    """

    unit: Unit
    views: Mapping[int, MatrixView]
    shape: Shape
    polar: PolarSpec
    bucket_mb: float
    overlap: bool
    stacked: bool
    timed: Mapping[tuple[int, int], float] | None = None
    fraction: float = 1.0

    even = True
    """Whether equal parameters are cut alike, so that their slices may be copied together."""

    @cached_property
    def costs(self) -> dict[int, float]:
        """Of each parameter's matrices, in any unit; only ratios matter."""
        by_view = {view: self._cost(view) for view in set(self.worked.values())}
        return {param: by_view[view] for param, view in self.worked.items()}

    def _cost(self, view: MatrixView) -> float:
        if self.timed is not None:
            return sum(count * self.timed[m, n] for count, m, n in view.matrices())
        return sum(count * self.shape.cost(m, n, self.polar) for count, m, n in view.matrices())

    @cached_property
    def worked(self) -> Mapping[int, MatrixView]:
        """The matrices that owners get, by parameter: of the rows that a step takes."""
        if self.fraction == 1.0:
            return self.views
        selected = {view: view.selected(self.fraction) for view in set(self.views.values())}
        return {param: selected[view] for param, view in self.views.items()}

    @cached_property
    def sizes(self) -> frozenset[tuple[int, int]]:
        """(m, n) of all matrices."""
        return frozenset((m, n) for view in set(self.worked.values()) for _, m, n in view.matrices())

    @cached_property
    def cut(self) -> tuple[int, ...]:
        """Parameters of which several ranks hold a part."""
        return tuple(param for param in self.views if len(self.unit.holders(param)) > 1)

    @cached_property
    def whole(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """By rank, batches of parameters that lie whole there and never travel, each of one view, to be stacked."""
        return tuple(tuple(self._runs(params, self.batch_elements, self.views)) for params in self._whole)

    @cached_property
    def _whole(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.unit.world_size)]
        for param in self.views.keys() - self.cut:
            found[self.unit.holders(param)[0][0]].append(param)
        return [sorted(params) for params in found]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that travel, the same list on every rank; a matrix that is larger than a bucket has one to itself."""
        owned: list[list[int]] = [[] for _ in range(self.unit.world_size)]
        for param, owner in zip(self.cut, self._owners(), strict=True):
            owned[owner].append(param)
        queues = [self._runs(params, self.bucket_elements, dict.fromkeys(params)) for params in owned]
        return tuple(
            Bucket(owned=tuple(queue[k] if k < len(queue) else () for queue in queues))
            for k in range(max(map(len, queues)))
        )

    def _owners(self) -> list[int]:
        """Of the parameters that travel. At stage 3 all ranks hold as much of each, so that no owner is nearer."""
        loads = [sum(self.costs[p] for p in params) for params in self._whole]
        costs = [self.costs[p] for p in self.cut]
        if self.unit.cut != "flat":
            return assign_owners(costs, loads)
        return nearest_owners(costs, loads, [{rank: s.numel for rank, s in self.unit.holders(p)} for p in self.cut])

    def _runs(self, params: Sequence[int], bound: int, kinds: Mapping[int, object]) -> list[tuple[int, ...]]:
        """The costliest first, equal ones side by side."""
        return in_runs(sorted(params, key=self._turn), {p: self._room(p) for p in params}, kinds, bound)

    def _turn(self, param: int) -> tuple[object, ...]:
        return -self.costs[param], repr(self.views[param]), param

    def _room(self, param: int) -> int:
        """Elements that a parameter is held for in a bucket."""
        return self.unit.params[param].numel

    @cached_property
    def batch_elements(self) -> int:
        """Bound on the elements of a batch of matrices that lie whole on a rank: what ``bucket_mb`` has room for."""
        return max(1, int(self.bucket_mb * _MIB / self.held_per_element))

    @cached_property
    def bucket_elements(self) -> int:
        """Bound on the elements that a rank owns in one bucket.

        With overlap there are some buckets even where one could hold all: nothing can be worked on while the first one
        travels to its owners, nor while the last one travels back.
        """
        if not self.overlap:
            return self.batch_elements
        cut = sum(self.unit.params[param].numel for param in self.cut)
        return min(self.batch_elements, max(_LEAST_BUCKET, -(-cut // (_BUCKETS * self.unit.world_size))))

    @cached_property
    def loads(self) -> list[float]:
        """Each rank's modelled work."""
        found = [sum(self.costs[p] for p in params) for params in self._whole]
        for bucket in self.buckets:
            for rank, params in enumerate(bucket.owned):
                found[rank] += sum(self.costs[p] for p in params)
        return found

    @cached_property
    def makespan(self) -> float:
        """The busiest rank's modelled work over the best that any assignment could reach."""
        return makespan_ratio(self.loads, [self.costs[p] for p in self.cut])

    @property
    def of_whole(self) -> ExchangePlan:
        """The plan of whole matrices, where ranks share some (shares.py)."""
        return self

    @property
    def shared(self) -> int:
        """How many matrices ranks share."""
        return 0

    def digest(self) -> str:
        """A hash that two ranks share only if they will post the same messages and work on matrices alike."""
        what = self.unit, sorted(self.views.items()), self.whole, self.buckets, self.shape.name, self.polar
        return hashlib.sha256(repr(what).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------- what travels

    @cached_property
    def working(self) -> Working:
        """What owners make of matrices."""
        return Working(shape=self.shape, polar=self.polar, stacked=self.stacked)

    @property
    def there(self) -> tuple[Part, ...]:
        """What travels to the owners, a message each."""
        return self.working.there

    @property
    def back(self) -> tuple[Part, ...]:
        """What travels back."""
        return self.working.back

    @property
    def element_bytes(self) -> int:
        """Of an element, there and back together; what travels of rows is beside it."""
        return sum(part.dtype.itemsize for part in (*self.there, *self.back) if not part.per_row)

    def sent_counts(self, bucket: Bucket, rank: int, part: Part = ELEMENTS) -> list[int]:
        """Values that ``rank`` sends to each owner; what it owns itself stays where it is."""
        return [
            0 if owner == rank else sum(self.held(param, rank, part) for param in params)
            for owner, params in enumerate(bucket.owned)
        ]

    def received_counts(self, bucket: Bucket, rank: int, part: Part = ELEMENTS) -> list[int]:
        """Values that ``rank``, as an owner, receives from each rank."""
        return [
            0 if source == rank else sum(self.held(param, source, part) for param in bucket.owned[rank])
            for source in range(self.unit.world_size)
        ]

    def held(self, param: int, rank: int, part: Part) -> int:
        """Values of a parameter's part that ``rank`` holds."""
        held = self.unit.slice_of(param, rank)
        if held is None:
            return 0
        first, last = part.place(self.views[param], held.start, held.numel)
        return last - first

    def sent_bytes(self, rank: int) -> int:
        """Bytes that ``rank`` sends in one exchange: its slices out, and its results back."""
        return sum(sum(self.bytes_by_peer(bucket, rank)) for bucket in self.buckets)

    def bytes_by_peer(self, bucket: Bucket, rank: int) -> list[int]:
        """Bytes that ``rank`` sends to each rank for a bucket."""
        there = [(self.sent_counts(bucket, rank, part), part) for part in self.there]
        back = [(self.received_counts(bucket, rank, part), part) for part in self.back]
        found = [0] * self.unit.world_size
        for counts, part in (*there, *back):
            for peer, count in enumerate(counts):
                found[peer] += count * part.dtype.itemsize
        return [math.ceil(count * self.fraction) for count in found]

    @cached_property
    def held_per_element(self) -> float:
        """The most bytes that an exchange holds for each element that a rank owns in a bucket: the c in
        max(bucket, c x largest matrix); at stage 3 c more for each parameter, of which a rank holds an N-th, rounded
        up.

        That is a bucket in work (messages, stacks, results, temporaries), with overlap also the next one on its way
        in and the last one on its way out.
        """
        return max(map(self._per_element, set(self.views.values())))

    def _per_element(self, view: MatrixView) -> float:
        return self.working.per_element(view, moved=_MOVED[self.unit.cut], overlap=self.overlap)
