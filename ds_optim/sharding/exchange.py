"""Bring cut matrices together on their owners, work on them there, and bring the results back.

One exchange is two ``all_to_all_single`` a bucket: slices travel to the owner of their matrix, results
travel back the same way. While a bucket is worked on, the next one is on its way in and the last one on
its way out; matrices that lie whole on a rank are done while the first messages fly.

Scratch: at most three buckets are alive at a time (two without overlap), each with its message and the
stack of the matrices that this rank owns in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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

Stacked = tuple[Sequence[int], Tensor]
"""Parameters of one view, and their elements: (B, numel)."""


@dataclass
class _Flight:
    """A bucket under way: its messages, and the matrices that this rank puts together from them."""

    bucket: Bucket
    outgoing: Tensor
    incoming: Tensor
    stacks: list[Stacked]
    pending: Pending
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)


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

    def run(self, fill: Fill, solve: Solve, apply: Apply, absent: frozenset[int] = frozenset()) -> None:
        """Give every matrix of the plan its update.

        ``fill`` is called once for each local slice and ``apply`` once after it, in the same order on
        every run. ``absent`` names parameters to leave alone; it is for unsharded training, where a
        parameter may have no gradient and no other rank waits for it.
        """
        if absent and self.plan.buckets:
            raise ValueError("only parameters that no other rank shares can be left out of an exchange")
        buckets = self.plan.buckets
        flying = self._depart(buckets[0], fill) if buckets else None
        self._whole_matrices(fill, solve, apply, absent)
        landing: _Flight | None = None
        for following in [*buckets[1:], None]:
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

    def _whole_matrices(self, fill: Fill, solve: Solve, apply: Apply, absent: frozenset[int]) -> None:
        unit, rank = self.plan.unit, self.comm.rank
        for batch in self.plan.whole[rank]:
            params = [p for p in batch if p not in absent]
            if not params:
                continue
            held = [s for s in (unit.slice_of(p, rank) for p in params) if s is not None]
            stack = self._stack(params)
            for row, piece in enumerate(held):
                fill(piece, stack[row])
            stack = solve(self.plan.views[params[0]], stack)
            for row, piece in enumerate(held):
                apply(piece, stack[row])

    def _stack(self, params: Sequence[int]) -> Tensor:
        numel = self.plan.unit.params[params[0]].numel
        return torch.empty(len(params), numel, dtype=self.dtype, device=self.device)

    def _depart(self, bucket: Bucket, fill: Fill) -> _Flight:
        """Post the messages that bring a bucket's matrices to their owners."""
        plan, rank = self.plan, self.comm.rank
        sent, received = plan.sent_counts(bucket, rank), plan.received_counts(bucket, rank)
        outgoing = torch.empty(sum(sent), dtype=self.dtype, device=self.device)
        incoming = torch.empty(sum(received), dtype=self.dtype, device=self.device)
        for piece, message in self._outgoing_pieces(bucket, outgoing):
            fill(piece, message)
        stacks: list[Stacked] = [(params, self._stack(params)) for params in _runs(bucket.owned[rank], plan.views)]
        for piece, row in self._own_pieces(stacks):
            fill(piece, row)
        pending = self.comm.all_to_all(incoming, received, outgoing, sent)
        return _Flight(bucket, outgoing, incoming, stacks, pending, sent, received)

    def _work(self, flight: _Flight, solve: Solve, apply: Apply) -> None:
        """Put the matrices together, work on them, and post the results to the ranks they came from."""
        flight.pending.wait()
        for row, message in self._incoming_pieces(flight):
            row.copy_(message)
        flight.stacks = [(params, solve(self.plan.views[params[0]], stack)) for params, stack in flight.stacks]
        for row, message in self._incoming_pieces(flight):
            message.copy_(row)
        flight.pending = self.comm.all_to_all(flight.outgoing, flight.sent, flight.incoming, flight.received)
        for piece, row in self._own_pieces(flight.stacks):
            apply(piece, row)
        flight.stacks = []

    def _land(self, flight: _Flight, apply: Apply) -> None:
        flight.pending.wait()
        for piece, message in self._outgoing_pieces(flight.bucket, flight.outgoing):
            apply(piece, message)

    def _outgoing_pieces(self, bucket: Bucket, message: Tensor) -> Iterator[tuple[Slice, Tensor]]:
        """This rank's slices of other owners' matrices, each with its place in the message."""
        unit, rank = self.plan.unit, self.comm.rank
        position = 0
        for owner, params in enumerate(bucket.owned):
            for param in params if owner != rank else ():
                held = unit.slice_of(param, rank)
                if held is not None:
                    yield held, message[position : position + held.numel]
                    position += held.numel

    def _own_pieces(self, stacks: list[Stacked]) -> Iterator[tuple[Slice, Tensor]]:
        """This rank's slices of the matrices that it owns, each with its place in the stack."""
        for params, stack in stacks:
            for row, param in enumerate(params):
                held = self.plan.unit.slice_of(param, self.comm.rank)
                if held is not None:
                    yield held, stack[row, held.start : held.start + held.numel]

    def _incoming_pieces(self, flight: _Flight) -> Iterator[tuple[Tensor, Tensor]]:
        """Places in this rank's stacks, each with the piece of another rank's message that belongs there."""
        unit, rank = self.plan.unit, self.comm.rank
        rows = {p: stack[row] for params, stack in flight.stacks for row, p in enumerate(params)}
        position = 0
        for source in range(unit.world_size):
            for param in flight.bucket.owned[rank] if source != rank else ():
                held = unit.slice_of(param, source)
                if held is not None:
                    piece = flight.incoming[position : position + held.numel]
                    yield rows[param][held.start : held.start + held.numel], piece
                    position += held.numel


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
