"""Bring cut matrices together on their owners, work on them there, and bring the results back.

One exchange is two ``all_to_all_single`` a bucket: slices travel to the owner of their matrix, results
travel back the same way. While a bucket is worked on, the next one is on its way in and the last one on
its way out; matrices that lie whole on a rank are done while the first messages fly.

Scratch: at most three buckets are alive at a time (two without overlap), each with its message and the
stack of the matrices that this rank owns in it. A profiler's trace names the beats: ``DEPART``, ``SOLVE``, ``LAND``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm, Pending
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.plan import Bucket, ExchangePlan

DEPART, SOLVE, LAND = "ds_optim: depart", "ds_optim: solve", "ds_optim: land"
"""Slices leave for their owners; matrices are worked on; results are applied where they belong."""

Fill = Callable[[Slice, Sequence[Tensor]], None]
"""Write what a slice contributes into 1-D messages, one for each dtype that travels."""
Solve = Callable[[MatrixView, Sequence[Tensor]], Tensor]
"""Stacks (B, numel) of equal parameters, one for each dtype that travels -> the results, (B, numel)."""
Apply = Callable[[Slice, Tensor], None]
"""Take a slice's part of the result, 1-D."""


@dataclass(frozen=True)
class _Route:
    """What one bucket means for one rank, worked out once.

    ``outgoing`` are this rank's slices of other owners' matrices with their ends in the message; ``incoming`` the
    places (parameter, first and last element) that the pieces of the incoming message belong to, in its order.
    """

    sent: list[int]
    received: list[int]
    outgoing: list[tuple[Slice, int, int]]
    incoming: list[tuple[int, int, int]]
    own: list[list[tuple[int, Slice | None]]]


@dataclass
class _Letter:
    """What travels of one bucket in one dtype: sent, received, and under way."""

    message: Tensor
    arrived: Tensor
    pending: Pending


@dataclass
class _Flight:
    """A bucket under way.

    ``letters``: one for each dtype on the way to the owner, one on the way back. ``stacks``: for each letter the
    matrices that this rank puts together from it, a stack for each run of equal parameters.
    """

    route: _Route
    letters: list[_Letter]
    stacks: list[list[Tensor]]


class Exchange:
    """Runs one :class:`ExchangePlan` on one rank.

    Args:
        device: where messages and matrices live (the accelerator, also when the partitions are offloaded).
        dtypes: of the messages to the owner and their stacks; most rules send one.
        result: the dtype of what travels back; that of the first message where None.
        overlap: keep a bucket in flight on either side of the one in work.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        comm: Comm,
        *,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        result: torch.dtype | None = None,
        overlap: bool = True,
    ) -> None:
        self.plan = plan
        self.comm = comm
        self.device = device
        self.dtypes = tuple(dtypes)
        self.result = result or self.dtypes[0]
        self.overlap = overlap
        self._routes = [self._route(bucket) for bucket in plan.buckets]
        self._whole = [self._pieces(batch) for batch in plan.whole[comm.rank]]

    def _pieces(self, params: Sequence[int]) -> list[tuple[int, Slice | None]]:
        return [(param, self.plan.unit.slice_of(param, self.comm.rank)) for param in params]

    def _route(self, bucket: Bucket) -> _Route:
        plan, unit, rank = self.plan, self.plan.unit, self.comm.rank
        outgoing: list[tuple[Slice, int, int]] = []
        position = 0
        for owner, params in enumerate(bucket.owned):
            for _, held in self._pieces(params) if owner != rank else ():
                if held is not None:
                    outgoing.append((held, position, position + held.numel))
                    position += held.numel
        incoming = []
        for source in range(unit.world_size):
            for param in bucket.owned[rank] if source != rank else ():
                there = unit.slice_of(param, source)
                if there is not None:
                    incoming.append((param, there.start, there.start + there.numel))
        return _Route(
            sent=plan.sent_counts(bucket, rank),
            received=plan.received_counts(bucket, rank),
            outgoing=outgoing,
            incoming=incoming,
            own=[self._pieces(run) for run in _runs(bucket.owned[rank], plan.views)],
        )

    def run(self, fill: Fill, solve: Solve, apply: Apply, absent: frozenset[int] = frozenset()) -> None:
        """Give every matrix of the plan its update.

        ``fill`` is called once for each local slice and ``apply`` once after it, in the same order on
        every run. ``absent`` names parameters to leave alone; it is for unsharded training, where a
        parameter may have no gradient and no other rank waits for it.
        """
        if absent and self.plan.buckets:
            raise ValueError("only parameters that no other rank shares can be left out of an exchange")
        flying = self._depart(self._routes[0], fill) if self._routes else None
        for pieces in self._whole:
            self._work_whole([(p, held) for p, held in pieces if p not in absent], fill, solve, apply)
        landing: _Flight | None = None
        for following in [*self._routes[1:], None]:
            if flying is None:
                break
            current = flying
            flying = self._depart(following, fill) if following and self.overlap else None
            self._work(current, solve, apply)
            if landing is not None:
                self._land(landing, apply)
            landing = current
            if not self.overlap:
                self._land(landing, apply)
                landing = None
                flying = self._depart(following, fill) if following else None
        if landing is not None:
            self._land(landing, apply)

    def _work_whole(self, pieces: Sequence[tuple[int, Slice | None]], fill: Fill, solve: Solve, apply: Apply) -> None:
        """Matrices of one view that lie whole on this rank."""
        if not pieces:
            return
        stacks = self._stacks(pieces)
        for number, (_, held) in enumerate(pieces):
            assert held is not None
            fill(held, [stack[number] for stack in stacks])
        with record_function(SOLVE):
            result = solve(self.plan.views[pieces[0][0]], stacks)
        for row, (_, held) in zip(result, pieces, strict=True):
            assert held is not None
            apply(held, row)

    def _stacks(self, pieces: Sequence[tuple[int, Slice | None]]) -> list[Tensor]:
        """Room for a run of equal parameters, in each dtype that travels."""
        numel = self.plan.unit.params[pieces[0][0]].numel
        return [torch.empty(len(pieces), numel, dtype=dtype, device=self.device) for dtype in self.dtypes]

    def _post(self, message: Tensor, counts: list[int], out_counts: list[int]) -> _Letter:
        arrived = torch.empty(sum(out_counts), dtype=message.dtype, device=self.device)
        return _Letter(message, arrived, self.comm.all_to_all(arrived, out_counts, message, counts))

    def _depart(self, route: _Route, fill: Fill) -> _Flight:
        """Post the messages that bring a bucket's matrices to their owners."""
        with record_function(DEPART):
            return self._departed(route, fill)

    def _departed(self, route: _Route, fill: Fill) -> _Flight:
        messages = [torch.empty(sum(route.sent), dtype=dtype, device=self.device) for dtype in self.dtypes]
        for held, begin, end in route.outgoing:
            fill(held, [message[begin:end] for message in messages])
        letters = [self._post(message, route.sent, route.received) for message in messages]
        by_run = [self._stacks(pieces) for pieces in route.own]
        stacks = [[run[number] for run in by_run] for number in range(len(self.dtypes))]
        for rows in zip(*(_own_rows(route, stack) for stack in stacks), strict=True):
            fill(rows[0][0], [row for _, row in rows])
        return _Flight(route, letters, stacks)

    def _work(self, flight: _Flight, solve: Solve, apply: Apply) -> None:
        """Put the matrices together, work on them, and post the results to the ranks they came from."""
        route = flight.route
        for letter, stacks in zip(flight.letters, flight.stacks, strict=True):
            letter.pending.wait()
            for place, piece in _arrived_pieces(route, stacks, letter.arrived):
                place.copy_(piece)
        with record_function(SOLVE):
            results = [
                solve(self.plan.views[pieces[0][0]], [stacks[number] for stacks in flight.stacks])
                for number, pieces in enumerate(route.own)
            ]
        message = flight.letters[0].arrived
        flight.letters, flight.stacks = [], []  # what came is worked into the results: let go of it
        if message.dtype != self.result:
            message = torch.empty(message.shape, dtype=self.result, device=self.device)
        for place, piece in _arrived_pieces(route, results, message):
            piece.copy_(place)
        flight.letters = [self._post(message, route.received, route.sent)]
        for held, row in _own_rows(route, results):
            apply(held, row)

    def _land(self, flight: _Flight, apply: Apply) -> None:
        (letter,) = flight.letters
        letter.pending.wait()
        with record_function(LAND):
            for held, begin, end in flight.route.outgoing:
                apply(held, letter.arrived[begin:end])


def _own_rows(route: _Route, stacks: Sequence[Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """This rank's slices of the matrices that it owns, each with its place in the stacks."""
    for pieces, stack in zip(route.own, stacks, strict=True):
        for row, (_, held) in zip(stack, pieces, strict=True):
            if held is not None:
                yield held, row[held.start : held.start + held.numel]


def _arrived_pieces(route: _Route, stacks: Sequence[Tensor], arrived: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in this rank's stacks, each with the piece of another rank's message that belongs there."""
    rows = {
        param: row
        for pieces, stack in zip(route.own, stacks, strict=True)
        for (param, _), row in zip(pieces, stack, strict=True)
    }
    position = 0
    for param, begin, end in route.incoming:
        yield rows[param][begin:end], arrived[position : position + end - begin]
        position += end - begin


def _runs(params: Sequence[int], views: Mapping[int, MatrixView]) -> Iterator[list[int]]:
    """Neighbours in a bucket that share a view, so that they can be stacked."""
    run: list[int] = []
    for param in params:
        if run and views[run[0]] != views[param]:
            yield run
            run = []
        run.append(param)
    if run:
        yield run
