"""Bring cut matrices together on their owners, work on them there, and bring the results back.

One exchange is two ``all_to_all_single`` a bucket and part of a message: slices travel to the owner of their matrix,
results travel back the same way. While a bucket is worked on, the next one is on its way to the owners and the last one
on its way back; matrices that lie whole on a rank are done while the first messages travel.

Scratch: at most three buckets are alive at a time (two without overlap), each with its message and the
stack of the matrices that this rank owns in it. A profiler's trace names the stages: ``SEND``, ``SOLVE``, ``APPLY``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.profiler import record_function

from ds_optim.matrix.shapes import Part
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm, Pending
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.plan import Bucket, ExchangePlan

SEND, SOLVE, APPLY = "ds_optim: send", "ds_optim: solve", "ds_optim: apply"
"""Slices leave for their owners; matrices are worked on; results are applied where they belong."""

Values = Callable[[Slice, Sequence[Tensor]], None]
"""Called with a slice and 1-D values of it, one tensor for each part that travels: to write them into messages to the
owner, or to take them as results from it."""
Solve = Callable[[MatrixView, Sequence[Tensor]], Sequence[Tensor]]
"""Stacks (B, values) of equal parameters, one for each part that came -> of the results, one for each part that goes
back."""

_Pieces = Iterator[tuple[Slice, list[Tensor]]]
_Counts = Mapping[bool, list[int]]
"""Values to or from each rank, of elements and of rows (``Part.per_row``)."""


@dataclass(frozen=True)
class _Route:
    """What one bucket means for one rank, worked out once.

    ``outgoing`` are this rank's slices of other owners' matrices, ``incoming`` the others' slices of its own ones, both
    in the order of their messages, and ``kept`` its slices of its own ones. ``runs``: the parameters that it owns,
    neighbours of one view together, to be stacked.
    """

    sent: _Counts
    received: _Counts
    outgoing: list[Slice]
    incoming: list[Slice]
    kept: list[Slice]
    runs: list[list[int]]


class Exchange:
    """Runs one :class:`ExchangePlan` on one rank.

    Args:
        device: where messages and matrices live (the accelerator, also when the partitions are offloaded).
    """

    def __init__(self, plan: ExchangePlan, comm: Comm, device: torch.device) -> None:
        self.plan = plan
        self.comm = comm
        self.device = device
        self._routes = [self._route(bucket) for bucket in plan.buckets]
        self._whole = [self._slices(batch, comm.rank) for batch in plan.whole[comm.rank]]

    def _slices(self, params: Sequence[int], rank: int) -> list[Slice]:
        """What ``rank`` holds of these parameters."""
        held = (self.plan.unit.slice_of(param, rank) for param in params)
        return [part for part in held if part is not None]

    def _route(self, bucket: Bucket) -> _Route:
        plan, rank = self.plan, self.comm.rank
        own = bucket.owned[rank]
        others = [peer for peer in range(plan.unit.world_size) if peer != rank]
        kinds = {part.per_row: part for part in (*plan.there, *plan.back)}
        return _Route(
            sent={kind: plan.sent_counts(bucket, rank, part) for kind, part in kinds.items()},
            received={kind: plan.received_counts(bucket, rank, part) for kind, part in kinds.items()},
            outgoing=[held for owner in others for held in self._slices(bucket.owned[owner], rank)],
            incoming=[held for source in others for held in self._slices(own, source)],
            kept=self._slices(own, rank),
            runs=[list(run) for _, run in groupby(own, key=plan.views.__getitem__)],
        )

    def run(self, fill: Values, solve: Solve, apply: Values, absent: frozenset[int] = frozenset()) -> None:
        """Give every matrix of the plan its update.

        ``fill`` is called once for each local slice and ``apply`` once after it, in the same order on
        every run. ``absent`` names parameters to leave alone; it is for unsharded training, where a
        parameter may have no gradient and no other rank waits for it.
        """
        if absent and self.plan.buckets:
            raise ValueError("only parameters that no other rank shares can be left out of an exchange")
        buckets = [self._bucket(route, fill, solve, apply) for route in self._routes]
        for first in buckets[:1]:
            next(first)
        for batch in self._whole:
            self._work_whole([held for held in batch if held.param not in absent], fill, solve, apply)
        if not self.plan.overlap:
            for bucket in buckets:
                for _ in bucket:
                    pass
            return
        for number in range(len(buckets) + 1):  # the next one leaves, this one is worked on, the last one is applied
            for bucket in reversed(buckets[max(0, number - 1) : number + 2]):
                next(bucket, None)

    def _work_whole(self, batch: Sequence[Slice], fill: Values, solve: Solve, apply: Values) -> None:
        """Matrices of one view that lie whole on this rank."""
        if not batch:
            return
        run = [held.param for held in batch]
        stacks = self._stacks(run)
        _call(fill, self._in_stacks(batch, [run], [stacks], self.plan.there))
        with record_function(SOLVE):
            results = solve(self.plan.views[run[0]], stacks)
        _call(apply, self._in_stacks(batch, [run], [results], self.plan.back))

    def _bucket(self, route: _Route, fill: Values, solve: Solve, apply: Values) -> Iterator[None]:
        """The way of a bucket in three stages, that others' stages run between: there, work, back."""
        there, back = self.plan.there, self.plan.back
        with record_function(SEND):
            messages = [self._message(route.sent, part) for part in there]
            _call(fill, self._in_messages(route.outgoing, messages, there))
            arrived, pending = self._post(messages, there, route.sent, route.received)
            stacks = [self._stacks(run) for run in route.runs]
            _call(fill, self._in_stacks(route.kept, route.runs, stacks, there))
        yield
        _wait(pending)
        _copy(
            self._in_messages(route.incoming, arrived, there),
            self._in_stacks(route.incoming, route.runs, stacks, there),
        )
        with record_function(SOLVE):
            views = [self.plan.views[run[0]] for run in route.runs]
            results = [solve(view, stack) for view, stack in zip(views, stacks, strict=True)]
        messages = [
            arrived[number] if part == there[number] else self._message(route.received, part)
            for number, part in enumerate(back)
        ]
        del arrived, stacks  # they are worked into the results
        _copy(
            self._in_stacks(route.incoming, route.runs, results, back),
            self._in_messages(route.incoming, messages, back),
        )
        returned, pending = self._post(messages, back, route.received, route.sent)
        _call(apply, self._in_stacks(route.kept, route.runs, results, back))
        del results
        yield
        _wait(pending)
        with record_function(APPLY):
            _call(apply, self._in_messages(route.outgoing, returned, back))

    def _message(self, counts: _Counts, part: Part) -> Tensor:
        return torch.empty(sum(counts[part.per_row]), dtype=part.dtype, device=self.device)

    def _stacks(self, run: Sequence[int]) -> list[Tensor]:
        """Room for equal parameters, for each part that travels to their owner."""
        view = self.plan.views[run[0]]
        sizes = [(len(run), part.place(view, 0, view.numel)[1], part.dtype) for part in self.plan.there]
        return [torch.empty(many, values, dtype=dtype, device=self.device) for many, values, dtype in sizes]

    def _post(
        self, messages: Sequence[Tensor], parts: Sequence[Part], counts: _Counts, out_counts: _Counts
    ) -> tuple[list[Tensor], list[Pending]]:
        """Send a message for each part; what arrives, once it has been waited for."""
        arrived = [self._message(out_counts, part) for part in parts]
        pending = [
            self.comm.all_to_all(out, out_counts[part.per_row], message, counts[part.per_row])
            for out, message, part in zip(arrived, messages, parts, strict=True)
        ]
        return arrived, pending

    def _in_messages(self, slices: Sequence[Slice], messages: Sequence[Tensor], parts: Sequence[Part]) -> _Pieces:
        """Slices, in the order in which they stand in messages, each with its values in them."""
        begins = [0] * len(parts)
        for held in slices:
            sizes = [last - first for first, last in self._places(held, parts)]
            yield held, [m[begin : begin + size] for m, begin, size in zip(messages, begins, sizes, strict=True)]
            begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]

    def _in_stacks(
        self,
        slices: Sequence[Slice],
        runs: Sequence[Sequence[int]],
        stacks: Sequence[Sequence[Tensor]],
        parts: Sequence[Part],
    ) -> _Pieces:
        """Slices, each with its values in the stacks of runs of equal parameters."""
        rows = {
            param: [stack[number] for stack in of_run]
            for run, of_run in zip(runs, stacks, strict=True)
            for number, param in enumerate(run)
        }
        for held in slices:
            places = self._places(held, parts)
            yield held, [row[first:last] for row, (first, last) in zip(rows[held.param], places, strict=True)]

    def _places(self, held: Slice, parts: Sequence[Part]) -> list[tuple[int, int]]:
        view = self.plan.views[held.param]
        return [part.place(view, held.start, held.numel) for part in parts]


def _call(function: Values, pieces: _Pieces) -> None:
    # Loops stand in functions of their own: a variable left over from one would keep a message alive.
    for held, values in pieces:
        function(held, values)


def _copy(sources: _Pieces, targets: _Pieces) -> None:
    for (_, values), (_, places) in zip(sources, targets, strict=True):
        for value, place in zip(values, places, strict=True):
            place.copy_(value)


def _wait(pending: list[Pending]) -> None:
    """Until all is there, and forget the requests: they hold their messages."""
    while pending:
        pending.pop(0).wait()
