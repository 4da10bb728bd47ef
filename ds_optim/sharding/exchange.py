"""Bring cut matrices together on their owners, work on them there, and bring the results back.

One exchange is two ``all_to_all_single`` a bucket: slices travel to the owner of their matrix, results
travel back the same way. While a bucket is worked on, the next one is on its way in and the last one on
its way out; matrices that lie whole on a rank are done while the first messages fly.

Scratch: at most three buckets are alive at a time (two without overlap), each with its message and the
stack of the matrices that this rank owns in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm, Pending
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.plan import Bucket, ExchangePlan

Fill = Callable[[Slice, Tensor], None]
"""Write what a slice contributes into a 1-D message."""
Solve = Callable[[MatrixView, Tensor], Tensor]
"""A stack (B, numel) of equal parameters -> the results, (B, numel) of the same dtype."""
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
class _Flight:
    """A bucket under way: its messages, and the matrices that this rank puts together from them."""

    route: _Route
    message: Tensor
    arrived: Tensor
    stacks: list[Tensor]
    pending: Pending


class Exchange:
    """Runs one :class:`ExchangePlan` on one rank.

    Args:
        device: where messages and matrices live (the accelerator, also when the partitions are offloaded).
        dtype: of messages and stacks.
        overlap: keep a bucket in flight on either side of the one in work.
    """

    def __init__(
        self, plan: ExchangePlan, comm: Comm, *, device: torch.device, dtype: torch.dtype, overlap: bool = True
    ) -> None:
        self.plan = plan
        self.comm = comm
        self.device = device
        self.dtype = dtype
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
        stack = self._stack(pieces)
        for row, (_, held) in zip(stack, pieces, strict=True):
            assert held is not None
            fill(held, row)
        result = solve(self.plan.views[pieces[0][0]], stack)
        for row, (_, held) in zip(result, pieces, strict=True):
            assert held is not None
            apply(held, row)

    def _stack(self, pieces: Sequence[tuple[int, Slice | None]]) -> Tensor:
        numel = self.plan.unit.params[pieces[0][0]].numel
        return torch.empty(len(pieces), numel, dtype=self.dtype, device=self.device)

    def _depart(self, route: _Route, fill: Fill) -> _Flight:
        """Post the messages that bring a bucket's matrices to their owners."""
        message = torch.empty(sum(route.sent), dtype=self.dtype, device=self.device)
        arrived = torch.empty(sum(route.received), dtype=self.dtype, device=self.device)
        for held, begin, end in route.outgoing:
            fill(held, message[begin:end])
        pending = self.comm.all_to_all(arrived, route.received, message, route.sent)
        stacks = [self._stack(pieces) for pieces in route.own]
        for held, row in _own_rows(route, stacks):
            fill(held, row)
        return _Flight(route, message, arrived, stacks, pending)

    def _work(self, flight: _Flight, solve: Solve, apply: Apply) -> None:
        """Put the matrices together, work on them, and post the results to the ranks they came from."""
        route = flight.route
        flight.pending.wait()
        for place, piece in _arrived_pieces(flight):
            place.copy_(piece)
        views = [self.plan.views[pieces[0][0]] for pieces in route.own]
        flight.stacks = [solve(view, stack) for view, stack in zip(views, flight.stacks, strict=True)]
        for place, piece in _arrived_pieces(flight):
            piece.copy_(place)
        flight.pending = self.comm.all_to_all(flight.message, route.sent, flight.arrived, route.received)
        for held, row in _own_rows(route, flight.stacks):
            apply(held, row)
        flight.stacks = []

    def _land(self, flight: _Flight, apply: Apply) -> None:
        flight.pending.wait()
        for held, begin, end in flight.route.outgoing:
            apply(held, flight.message[begin:end])


def _own_rows(route: _Route, stacks: Sequence[Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """This rank's slices of the matrices that it owns, each with its place in the stacks."""
    for pieces, stack in zip(route.own, stacks, strict=True):
        for row, (_, held) in zip(stack, pieces, strict=True):
            if held is not None:
                yield held, row[held.start : held.start + held.numel]


def _arrived_pieces(flight: _Flight) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in this rank's stacks, each with the piece of another rank's message that belongs there."""
    rows = {
        param: row
        for pieces, stack in zip(flight.route.own, flight.stacks, strict=True)
        for (param, _), row in zip(pieces, stack, strict=True)
    }
    position = 0
    for param, begin, end in flight.route.incoming:
        yield rows[param][begin:end], flight.arrived[position : position + end - begin]
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
