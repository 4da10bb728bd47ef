"""Any exchange brings every slice to its owner and back to its place: ranks as threads, messages through a mailroom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import Layout, ParamSpec, Slice, build_layout
from ds_optim.sharding.plan import ExchangePlan

from ..plans import plan_exchange

PATIENCE_S = 20.0


@dataclass
class Mailroom:
    """Messages between threads: by number of the call and sender, what goes to each rank."""

    ranks: int
    posted: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    arrival: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False

    def close(self) -> None:
        """A rank has failed: nobody waits for it."""
        with self.arrival:
            self.closed = True
            self.arrival.notify_all()

    def post(self, call: int, sender: int, pieces: list[Tensor]) -> None:
        with self.arrival:
            self.posted[call, sender] = pieces
            self.arrival.notify_all()

    def collect(self, call: int, rank: int) -> list[Tensor]:
        senders = [(call, sender) for sender in range(self.ranks)]
        with self.arrival:
            arrived = self.arrival.wait_for(
                lambda: self.closed or all(key in self.posted for key in senders), PATIENCE_S
            )
            if self.closed or not arrived:
                raise TimeoutError(f"rank {rank} waits for message {call}: a rank posts fewer than the others")
            return [self.posted[key][rank] for key in senders]


@dataclass
class ThreadComm(Comm):
    """A rank that is a thread."""

    room: Mailroom = field(default_factory=lambda: Mailroom(1))
    calls: int = 0

    def all_to_all(self, out: Tensor, out_counts: list[int], message: Tensor, counts: list[int]) -> _Delivery:
        assert message.numel() == sum(counts)
        assert out.numel() == sum(out_counts)
        call, self.calls = self.calls, self.calls + 1
        self.room.post(call, self.rank, [piece.clone() for piece in message.split(counts)])
        return _Delivery(self, call, out, out_counts)


@dataclass
class _Delivery:
    comm: ThreadComm
    call: int
    out: Tensor
    counts: list[int]

    def wait(self) -> None:
        pieces = self.comm.room.collect(self.call, self.comm.rank)
        assert [piece.numel() for piece in pieces] == self.counts, "what comes is what was expected"
        self.out.copy_(torch.cat(pieces))


@dataclass(frozen=True)
class Drawn:
    """A layout of matrices, and how its units are exchanged."""

    layout: Layout
    bucket_elements: int
    overlap: bool

    def plans(self) -> list[ExchangePlan]:
        """Worked out from the layout alone, as each rank does."""
        return [
            plan_exchange(unit, bucket_elements=self.bucket_elements, overlap=self.overlap)
            for unit in self.layout.units
        ]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    sides = st.integers(1, 9)
    groups = draw(st.lists(st.lists(st.tuples(sides, sides), min_size=1, max_size=7), min_size=1, max_size=2))
    stage = draw(st.sampled_from([1, 2, 3]))
    layout = build_layout(
        [[ParamSpec(name=f"{g}.{i}", shape=shape) for i, shape in enumerate(group)] for g, group in enumerate(groups)],
        stage=stage,
        world_size=draw(st.integers(2, 5)),
        param_alignment=draw(st.sampled_from([1, 4])) if stage < 3 else 1,
        sub_group_size=draw(st.sampled_from([20, 10**9])) if stage == 3 else 10**9,
    )
    return Drawn(layout, draw(st.sampled_from([1, 20, 60, 10_000])), draw(st.booleans()))


def on_every_rank(ranks: int, room: Mailroom, body: Callable[[int], None]) -> None:
    """Run ``body`` as each rank; the first failure of any is raised."""
    failures: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            body(rank)
        except BaseException as failure:  # raised below, where it is seen
            failures.append(failure)
            room.close()

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), "a rank hangs"
    if failures:
        raise failures[0]


@settings(max_examples=40, deadline=None)
@given(drawn(), st.booleans())
def test_every_slice_comes_back_to_its_place(case: Drawn, crosses: bool) -> None:
    """crosses: as where the slices lie on the host."""
    ranks = case.layout.world_size
    for number, unit in enumerate(case.layout.units):
        room = Mailroom(ranks)
        digests: dict[int, str] = {}
        wholes = {param: 1000.0 * (param + 1) + torch.arange(spec.numel) for param, spec in enumerate(unit.params)}
        seen: list[int] = []

        def as_rank(
            rank: int,
            number: int = number,
            room: Mailroom = room,
            digests: dict[int, str] = digests,
            wholes: dict[int, Tensor] = wholes,
            seen: list[int] = seen,
        ) -> None:
            plan = case.plans()[number]
            digests[rank] = plan.digest()
            comm = ThreadComm(rank, ranks, room=room)
            exchange = Exchange(plan, comm, torch.device("cpu"))
            exchange.crosses = crosses
            flat = torch.full((plan.unit.partition_numel,), -1.0)
            for held in plan.unit.slices(rank):
                flat[held.offset : held.offset + held.numel] = wholes[held.param][held.start :][: held.numel]
            back = torch.full_like(flat, -1.0)

            def fill(held: Slice, messages: Sequence[Tensor]) -> None:
                messages[0].copy_(flat[held.offset : held.offset + held.numel])

            def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
                for row in stacks[0]:
                    param = int(row[0]) // 1000 - 1
                    assert torch.equal(row, wholes[param]), "a matrix is whole where it is worked on"
                    seen.append(param)
                return [stacks[0].flip(1)]

            def apply(held: Slice, results: Sequence[Tensor]) -> None:
                back[held.offset : held.offset + held.numel] = results[0]

            exchange.run(fill, solve, apply)
            for held in plan.unit.slices(rank):
                expected = wholes[held.param].flip(0)[held.start :][: held.numel]
                assert torch.equal(back[held.offset : held.offset + held.numel], expected)
            covered = sum(held.numel for held in plan.unit.slices(rank))
            assert int((back == -1).sum()) == plan.unit.partition_numel - covered, "padding is left alone"

        on_every_rank(ranks, room, as_rank)
        assert sorted(seen) == list(range(len(unit.params))), "each matrix is worked on by one rank"
        assert len(set(digests.values())) == 1, "all ranks made the same plan"


@pytest.mark.parametrize("ranks", [4, 64])
@pytest.mark.parametrize("rank", [0, 2, -1])
def test_an_owner_copies_runs_of_equal_matrices_at_once(ranks: int, rank: int) -> None:
    """Of 192 matrices, in two shapes of which no rank's slice ends with a row: before and after its own, and the last
    rank's slices, which are shorter."""
    shapes = [(33, 65), (66, 65)] * 96
    (unit,) = build_layout(
        [[ParamSpec(name=str(number), shape=shape) for number, shape in enumerate(shapes)]], stage=3, world_size=ranks
    ).units
    exchange = Exchange(plan_exchange(unit, bucket_elements=10**9), Comm(rank % ranks, ranks), torch.device("cpu"))
    ((there, back),) = exchange._routes
    assert sum(map(len, there.runs)) >= 192 // ranks
    for copies in (*there.incoming, *back.incoming):
        assert len(copies) <= 3 * len(there.runs)
    assert sum(len(copies) for copies in there.crossing) == len(there.runs)
