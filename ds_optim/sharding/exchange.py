"""Bring cut matrices together on their owners, work on them there, and bring the results back.

One exchange is two ``all_to_all_single`` a bucket and part of a message: slices travel to the owner of their matrix,
results travel back the same way. While a bucket is worked on, the next one is on its way to the owners and the last one
on its way back; matrices that lie whole on a rank are done while the first messages travel.

Scratch: at most three buckets are alive at a time (two without overlap), each with its message and the
stack of the matrices that this rank owns in it. A profiler's trace names the stages: ``SEND``, ``SOLVE``, ``APPLY``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.profiler import record_function

from ds_optim.matrix.shapes import Part
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm, Pending
from ds_optim.sharding.copies import Copy, Lie, copies_of, to_messages, to_stacks
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.lines import Lines, Values, call
from ds_optim.sharding.plan import Bucket, ExchangePlan
from ds_optim.sharding.returns import Returns
from ds_optim.sharding.shards import ShardView, Solve, solve_whole

SEND, SOLVE, APPLY = "ds_optim: send", "ds_optim: solve", "ds_optim: apply"
"""Slices leave for their owners; matrices are worked on; results are applied where they belong."""

Place = tuple[Slice, list[slice], list[slice]]
"""A slice, and where its values of each part stand: in the messages, and in a row of the stacks."""


@dataclass(frozen=True)
class _Route:
    """What one bucket means for one rank on the way there or back, worked out once.

    ``outgoing`` are this rank's slices of other owners' matrices in the order of their messages, and ``kept`` its
    slices of its own ones: as in a message, where they cross, and ``in_stacks``, of each run. ``incoming``: for each
    part, the copies between messages and stacks of the others' slices of its own ones; ``crossing``: of those it has
    kept, where they cross. ``sent`` and ``received`` say for each part how many values of them stand in messages to or
    from each owner, and each holder. ``runs``: the parameters that it owns, neighbours of one view together, to be
    stacked.
    """

    sent: list[list[int]]
    received: list[list[int]]
    outgoing: Lines
    kept: Lines
    in_stacks: list[Lines]
    incoming: list[list[Copy]]
    crossing: list[list[Copy]]
    runs: list[list[int]]


class Exchange:
    """Runs one :class:`ExchangePlan` on one rank.

    Args:
        device: where messages and matrices live (the accelerator, also when the partitions are offloaded).
        tensor: the ranks that hold the other shards of matrices that tensor parallelism cut.
        home: where the slices lie, if elsewhere. They cross in pinned memory, all of a message or stack at once.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        comm: Comm,
        device: torch.device,
        tensor: Comm | None = None,
        home: torch.device | None = None,
    ) -> None:
        self.plan = plan
        self.comm = comm
        self.device = device
        self.tensor = tensor
        self.home = device if home is None else home
        self.crosses = self.home != device
        self._turn = 0
        self._routes = [(self._route(bucket, plan.there), self._route(bucket, plan.back)) for bucket in plan.buckets]
        self._whole = [self._both(batch) for batch in plan.whole[comm.rank]]

    def _both(self, batch: Sequence[int]) -> tuple[Lines, Lines]:
        """Of matrices that lie whole on this rank, there and back."""
        return self._in_stacks(batch, self.plan.there), self._in_stacks(batch, self.plan.back)

    def _slices(self, params: Sequence[int], rank: int) -> list[Slice]:
        """What ``rank`` holds of these parameters."""
        held = (self.plan.unit.slice_of(param, rank) for param in params)
        return [part for part in held if part is not None]

    def _route(self, bucket: Bucket, parts: Sequence[Part]) -> _Route:
        plan, rank = self.plan, self.comm.rank
        own = bucket.owned[rank]
        others = [peer for peer in range(plan.unit.world_size) if peer != rank]
        runs = [list(run) for _, run in groupby(own, key=plan.views.__getitem__)]
        rows = {param: (number, row) for number, run in enumerate(runs) for row, param in enumerate(run)}
        incoming = self._places((held for peer in others for held in self._slices(own, peer)), parts)
        outgoing = self._places((held for peer in others for held in self._slices(bucket.owned[peer], rank)), parts)
        kept = self._places(self._slices(own, rank), parts)
        return _Route(
            sent=[plan.sent_counts(bucket, rank, part) for part in parts],
            received=[plan.received_counts(bucket, rank, part) for part in parts],
            outgoing=self._in_messages(outgoing, parts),
            kept=self._in_messages(kept, parts),
            in_stacks=[self._in_stacks(run, parts) for run in runs],
            incoming=[_copies(incoming, rows, number, plan.even) for number in range(len(parts))],
            crossing=[_copies(kept, rows, number, plan.even) for number in range(len(parts))],
            runs=runs,
        )

    def _places(self, slices: Iterable[Slice], parts: Sequence[Part]) -> list[Place]:
        """Of slices that stand in messages one behind the other."""
        found: list[Place] = []
        begins = [0] * len(parts)
        for held in slices:
            view = self.plan.views[held.param]
            in_rows = [slice(*part.place(view, held.start, held.numel)) for part in parts]
            ends = [begin + span.stop - span.start for begin, span in zip(begins, in_rows, strict=True)]
            found.append((held, [slice(*span) for span in zip(begins, ends, strict=True)], in_rows))
            begins = ends
        return found

    def _in_messages(self, places: Sequence[Place], parts: Sequence[Part]) -> Lines:
        lies = [[(spans[n].start, spans[n].stop - spans[n].start) for _, spans, _ in places] for n in range(len(parts))]
        return Lines(self.plan.unit, self.comm.rank, [held for held, _, _ in places], lies)

    def _in_stacks(self, run: Sequence[int], parts: Sequence[Part]) -> Lines:
        """What this rank holds of equal parameters, in their stacks."""
        slices = [(row, held) for row, param in enumerate(run) for held in self._slices([param], self.comm.rank)]

        def lie(row: int, held: Slice, part: Part) -> tuple[int, int]:
            view = self.plan.views[held.param]
            first, end = part.place(view, held.start, held.numel)
            return row * part.place(view, 0, view.numel)[1] + first, end - first

        lies = [[lie(row, held, part) for row, held in slices] for part in parts]
        return Lines(self.plan.unit, self.comm.rank, [held for _, held in slices], lies)

    def run(self, fill: Values, solve: Solve, apply: Values, absent: frozenset[int] = frozenset()) -> None:
        """Give every matrix of the plan its update.

        ``fill`` is called once for each local slice and ``apply`` once after it, in the same order on
        every run; what they ask of ``elementwise``, a GPU may do for several slices at once. ``absent``
        names parameters to leave alone; it is for unsharded training, where a parameter may have no
        gradient and no other rank waits for it.
        """
        if absent and self.plan.buckets:
            raise ValueError("only parameters that no other rank shares can be left out of an exchange")
        self._turn = 0
        returns = Returns(apply, self.device, self.home)
        buckets = [self._bucket(there, back, fill, solve, returns) for there, back in self._routes]
        for first in buckets[:1]:
            next(first)
        for batch in self._whole:
            present = [held.param for held in batch[0].slices if held.param not in absent]
            self._work_whole(present, batch if not absent else self._both(present), fill, solve, returns)
        self._in_turns(buckets)
        returns.settle()

    def _in_turns(self, buckets: Sequence[Iterator[None]]) -> None:
        if not self.plan.overlap:
            for bucket in buckets:
                for _ in bucket:
                    pass
            return
        for number in range(len(buckets) + 1):  # the next one leaves, this one is worked on, the last one is applied
            for bucket in reversed(buckets[max(0, number - 1) : number + 2]):
                next(bucket, None)

    def _work_whole(
        self, batch: Sequence[int], lines: tuple[Lines, Lines], fill: Values, solve: Solve, returns: Returns
    ) -> None:
        """Matrices of one view that lie whole on this rank."""
        if not batch:
            return
        stacks = self._stacks(batch, self.home)
        call(fill, lines[:1], [stacks])
        stacks = _moved(stacks, self.device)
        with record_function(SOLVE):
            results = self._solved(solve, self.plan.views[batch[0]], stacks)
        returns.give(lines[1:], [results])

    def _bucket(self, there: _Route, back: _Route, fill: Values, solve: Solve, returns: Returns) -> Iterator[None]:
        """The way of a bucket in three stages, that others' stages run between: there, work, back."""
        with record_function(SEND):
            messages = self._filled(fill, there.outgoing, self.plan.there)
            arrived, pending = self._post(messages, there.sent, there.received)
            stacks = [self._stacks(run, self.device) for run in there.runs]
            if self.crosses:
                kept = self._filled(fill, there.kept, self.plan.there)
                to_stacks(there.crossing, kept, stacks)
                del kept
            else:
                call(fill, there.in_stacks, stacks)
        yield
        _wait(pending)
        to_stacks(there.incoming, arrived, stacks)
        with record_function(SOLVE):
            views = [self.plan.views[run[0]] for run in there.runs]
            results = [self._solved(solve, view, of_run) for view, of_run in zip(views, stacks, strict=True)]
        # What came is worked into the results: its messages go back in place of others where they can.
        messages = arrived if self.plan.there == self.plan.back else []
        del arrived, stacks
        messages = messages or self._messages(map(sum, back.received), self.plan.back, self.device)
        to_messages(back.incoming, results, messages)
        returned, pending = self._post(messages, back.received, back.sent)
        if self.crosses:
            kept = self._messages(back.kept.sizes, self.plan.back, self.device)
            to_messages(back.crossing, results, kept)
            returns.give([back.kept], [kept])
            del kept
        else:
            returns.give(back.in_stacks, results)
        del results
        yield
        _wait(pending)
        with record_function(APPLY):
            returns.give([back.outgoing], [returned])

    def _solved(self, solve: Solve, view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
        """Results of a stack; what tensor parallelism cut comes together first, on its ranks by turns."""
        if not isinstance(view, ShardView) or self.tensor is None:
            return solve(view, stacks)
        first, self._turn = self._turn, self._turn + len(stacks[0])
        return solve_whole(self.tensor, first, view, (self.plan.there, self.plan.back), stacks, solve)

    def _filled(self, fill: Values, lines: Lines, parts: Sequence[Part]) -> list[Tensor]:
        """Messages with slices of this rank in them."""
        messages = self._messages(lines.sizes, parts, self.home)
        call(fill, [lines], [messages])
        return _moved(messages, self.device)

    def _messages(self, sizes: Iterable[int], parts: Sequence[Part], device: torch.device) -> list[Tensor]:
        """Room for so many values of each part."""
        return [self._room((size,), part.dtype, device) for size, part in zip(sizes, parts, strict=True)]

    def _stacks(self, run: Sequence[int], device: torch.device) -> list[Tensor]:
        """Room for equal parameters, for each part that travels to their owner."""
        view = self.plan.views[run[0]]
        sizes = [(part.place(view, 0, view.numel)[1], part.dtype) for part in self.plan.there]
        return [self._room((len(run), size), dtype, device) for size, dtype in sizes]

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        pinned = self.device.type == "cuda" and device.type == "cpu"
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

    def _post(
        self, messages: Sequence[Tensor], counts: Sequence[list[int]], out_counts: Sequence[list[int]]
    ) -> tuple[list[Tensor], list[Pending]]:
        """What arrives for messages that are sent, and the requests to wait for."""
        arrived = [m.new_empty(sum(n)) for m, n in zip(messages, out_counts, strict=True)]
        each = zip(arrived, out_counts, messages, counts, strict=True)
        return arrived, [self.comm.all_to_all(*one) for one in each]


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same on the accelerator, for which the host does not wait."""
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def _copies(places: Sequence[Place], rows: Mapping[int, tuple[int, int]], part: int, even: bool) -> list[Copy]:
    """Between messages and stacks, of the values of one part."""
    lies = (
        Lie(*rows[held.param], spans[part].start, in_rows[part].start, in_rows[part].stop - in_rows[part].start)
        for held, spans, in_rows in places
    )
    return copies_of(lies, even=even)


def _wait(pending: list[Pending]) -> None:
    """Until all is there, and forget the requests: they hold their messages."""
    while pending:
        pending.pop(0).wait()
