"""The plan of an exchange: which rank works on which matrix, in which bucket, what travels, and what is held for it.

A plan is made from a :class:`Unit` and settings alone. Every rank, the estimate and a simulator of a cluster which is
not there compute the same one where operations are counted, and one hash tells whether two ranks mean the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, product

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import ELEMENTS, Part, Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.owners import assign_owners, in_runs, makespan_ratio, nearest_owners
from ds_optim.sharding.shards import ShardView

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
        by_view = {view: self._cost(view) for view in set(self.views.values())}
        return {param: by_view[view] for param, view in self.views.items()}

    def _cost(self, view: MatrixView) -> float:
        if self.timed is not None:
            return sum(count * self.timed[m, n] for count, m, n in self._worked(view))
        return sum(count * self.shape.cost(m, n, self.polar) for count, m, n in self._worked(view))

    def _worked(self, view: MatrixView) -> list[tuple[int, int, int]]:
        """The matrices that owners work on: of the rows that a step takes."""
        return self._seen[view].matrices()

    @cached_property
    def sizes(self) -> frozenset[tuple[int, int]]:
        """(m, n) of all matrices."""
        return frozenset((m, n) for view in set(self.views.values()) for _, m, n in self._worked(view))

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
    def there(self) -> tuple[Part, ...]:
        """What travels to the owners, a message each."""
        return self.shape.there(self.polar)

    @cached_property
    def back(self) -> tuple[Part, ...]:
        """What travels back."""
        return self.shape.back(self.polar)

    @property
    def element_bytes(self) -> int:
        """Of an element, there and back together; what travels of rows is beside it."""
        return sum(part.dtype.itemsize for part in (*self.there, *self.back) if not part.per_row)

    def sent_counts(self, bucket: Bucket, rank: int, part: Part = ELEMENTS) -> list[int]:
        """Values that ``rank`` sends to each owner; what it owns itself stays where it is."""
        return [
            0 if owner == rank else sum(self._held(param, rank, part) for param in params)
            for owner, params in enumerate(bucket.owned)
        ]

    def received_counts(self, bucket: Bucket, rank: int, part: Part = ELEMENTS) -> list[int]:
        """Values that ``rank``, as an owner, receives from each rank."""
        return [
            0 if source == rank else sum(self._held(param, source, part) for param in bucket.owned[rank])
            for source in range(self.unit.world_size)
        ]

    def _held(self, param: int, rank: int, part: Part) -> int:
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

    # ------------------------------------------------------------------------------------------------- what is held

    @cached_property
    def held_per_element(self) -> float:
        """The most bytes that an exchange holds for each element that a rank owns in a bucket: the c in
        max(bucket, c x largest matrix); at stage 3 c more for each parameter, of which a rank holds an N-th, rounded
        up.

        That is a bucket in work (messages, stacks, results, temporaries), with overlap also the next one on its way
        in and the last one on its way out.
        """
        return max(self._held_per_element(view) for view in set(self.views.values()))

    def _held_per_element(self, view: MatrixView) -> float:
        there, back = (_bytes_of([view], parts) / view.numel for parts in (self.there, self.back))
        moved = _MOVED[self.unit.cut]
        arriving = (moved + 1) * there
        temporaries = max(self._scratch(view, m, n) / (m * n) for _, m, n in view.matrices())
        if isinstance(view, ShardView):  # its owner holds all of it
            temporaries *= view.times
        working = back + (temporaries + self._copied(view) / view.numel)
        return arriving + working + (arriving + moved * back if self.overlap and moved else 0)

    def _scratch(self, view: MatrixView, m: int, n: int) -> int:
        """Bytes of temporaries of one (m, n) matrix of a view."""
        return self.shape.scratch(m, n, self.polar)

    def _copied(self, view: MatrixView) -> int:
        """Bytes of the copies that take a parameter's matrices out of it and put results back into one."""
        if isinstance(view, ShardView):  # messages, the whole, its result and that of the shard
            here, whole = (_bytes_of([seen], (*self.there, *self.back)) for seen in (view, view.whole))
            return 2 * here + 2 * whole + self._copied(view.whole)
        if not view.is_cut_up:
            return 0
        return _bytes_of([view], self.there) + (_bytes_of([view], self.back) if self.shape.result is not None else 0)

    def peak_scratch(self, rank: int, *, offloaded: bool = False) -> int:
        """The most bytes that a rank holds at once in an exchange: messages, stacks, results, and matrices in work; on
        the accelerator, where slices lie on the host."""
        arriving = [
            self._message_bytes(bucket, rank, self.there) + self._stack_bytes(bucket.owned[rank], self.there)
            for bucket in self.buckets
        ]
        most = behind = 0  # behind: results on their way to the host while the next matrices are worked on
        for batch in self.whole[rank]:
            held = self._stack_bytes(batch, self.there) + self._working(batch)
            most = max(most, held + sum(arriving[:1]) + behind)
            behind = offloaded * self._stack_bytes(batch, self.back)
        for number, bucket in enumerate(self.buckets):
            held = arriving[number] + self._working(bucket.owned[rank])
            leaving = self.buckets[number - 1 : number] if number else ()
            if self.overlap:
                held += sum(arriving[number + 1 : number + 2])
                held += sum(self._message_bytes(last, rank, self.back) for last in leaving)
            most = max(most, held + behind)
            if offloaded:
                last = bucket if not self.overlap else leaving[0] if leaving else None
                behind = self._moved_bytes(last or bucket, rank, self.back)[0 if last else 2]
        return most + (0 if offloaded else self._choice_bytes(rank))

    def _message_bytes(self, bucket: Bucket, rank: int, parts: Sequence[Part]) -> int:
        """What a rank sends and receives for a bucket one way."""
        return sum(self._moved_bytes(bucket, rank, parts)[:2])

    def _moved_bytes(self, bucket: Bucket, rank: int, parts: Sequence[Part]) -> tuple[int, int, int]:
        """What a rank sends to owners, receives as one, and keeps; of chosen rows at most, as all may be with one rank,
        which then keeps them all."""
        sent = received = kept = 0
        for part, (owner, params) in product(parts, enumerate(bucket.owned)):
            for param in params:
                held, whole = self._held(param, rank, part), self._values(self.views[param], part)
                most = self._values(self._seen[self.views[param]], part)
                if owner == rank:
                    received += min(whole - held, most) * part.dtype.itemsize
                    kept += (most - min(whole - held, most)) * part.dtype.itemsize
                else:
                    sent += min(held, most) * part.dtype.itemsize
        return sent, received, kept

    @staticmethod
    def _values(view: MatrixView, part: Part) -> int:
        first, last = part.place(view, 0, view.numel)
        return last - first

    @cached_property
    def _seen(self) -> dict[MatrixView, MatrixView]:
        """The matrices that owners get, by parameters' views: of the rows that a step takes."""
        return {
            view: view if self.fraction == 1.0 else view.selected(self.fraction) for view in set(self.views.values())
        }

    def _stack_bytes(self, params: Sequence[int], parts: Sequence[Part]) -> int:
        return _bytes_of([self._seen[self.views[param]] for param in params], parts)

    def _choice_bytes(self, rank: int) -> int:
        """What says during an exchange which rows were chosen: a byte a row, and 8 for how many are before it."""
        if self.fraction == 1.0:
            return 0
        params = [*self.cut, *chain.from_iterable(self.whole[rank])]
        return sum(9 * self.views[param].of_rows.numel for param in params) + 8 * bool(params)

    def _working(self, params: Sequence[int]) -> int:
        """The most bytes beside their stacks while matrices are worked on, run by run of equal ones: results so far,
        and what the run in work holds."""
        most = done = 0
        for view, run in groupby(self._seen[self.views[param]] for param in params):
            equal = len(list(run))
            most = max(most, done + self._held_by(view, equal))
            done += equal * _bytes_of([view], self._new_parts(view))
        return max(most, done)

    def _new_parts(self, view: MatrixView) -> list[Part]:
        """Of what goes back, that for which there is no room in the stack that came: rows move on where they are, and
        so do matrices that are packed again."""
        if isinstance(view, ShardView):
            return list(self.back)
        in_stack = self.there if view.is_cut_up else [part for part in self.there if part.per_row]
        return [part for part in self.back if part not in in_stack]

    def _held_by(self, view: MatrixView, equal: int) -> int:
        """The most bytes beside its stack that a run of so many equal parameters holds in work, results among them."""
        blocks = [
            (count * equal, m, n, (count * equal if self.stacked else 1) * self.shape.scratch(m, n, self.polar))
            for count, m, n in view.matrices()
        ]
        packed = equal * _bytes_of([view], self._new_parts(view))
        if isinstance(view, ShardView) or not view.is_cut_up:
            return packed + equal * self._copied(view) + max(scratch for *_, scratch in blocks)
        most = done = 0  # block by block: what was taken out of parameters, and what was made of it until it is packed
        for many, m, n, scratch in blocks:
            taken = many * _bytes_of_matrix(m, n, self.there)
            made = many * _bytes_of_matrix(m, n, [part for part in self.back if not part.per_row])
            most = max(most, done + taken + made + scratch)
            done += made + many * _bytes_of_matrix(m, n, [part for part in self.back if part.per_row])
        return max(most, done + packed)


def _bytes_of_matrix(m: int, n: int, parts: Sequence[Part]) -> int:
    return sum((m if part.per_row else m * n) * part.dtype.itemsize for part in parts)


def _bytes_of(views: Sequence[MatrixView], parts: Sequence[Part]) -> int:
    """Of whole parameters."""
    return sum(part.place(view, 0, view.numel)[1] * part.dtype.itemsize for view in views for part in parts)
