"""Exchanges between real ranks: every element comes back from where it went, and the bytes are the plan's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.matrix.shapes import POLAR, ROWS, WEIGHT_BASIS, Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import ParamSpec, Slice, Unit, build_layout
from ds_optim.sharding.plan import ExchangePlan

from ..plans import plan_exchange
from .harness import device, run_ranks

CASES = 16
"""Random layouts for each world size."""


@dataclass(frozen=True)
class Case:
    """A random unit of matrices, a bucket's size, and a dtype of messages."""

    unit: Unit
    bucket_elements: int
    dtype: torch.dtype
    overlap: bool
    shape: Shape = POLAR

    def plan(self) -> ExchangePlan:
        return plan_exchange(
            self.unit, bucket_elements=self.bucket_elements, dtype=self.dtype, overlap=self.overlap, shape=self.shape
        )


def make_case(number: int, world_size: int) -> Case:
    random = Random(100 * world_size + number)
    # Few sizes, so that some matrices are stacked; some smaller than the world, so that ranks hold nothing of them.
    sides = [random.randint(1, 9) for _ in range(2)] + [1]
    shapes = [(random.choice(sides), random.choice(sides)) for _ in range(random.randint(1, 12))]
    specs = [ParamSpec(name=f"w{i}", shape=shape) for i, shape in enumerate(shapes)]
    layout = build_layout([specs], stage=(1, 3)[number % 2], world_size=world_size)
    return Case(
        unit=layout.units[0],
        bucket_elements=random.choice([1, 20, 60, 10_000]),
        dtype=(torch.float32, torch.bfloat16)[number // 2 % 2],
        overlap=bool(number // 4 % 2),
    )


@dataclass
class Seen:
    """What a rank saw of one case.

    returned: elements that came back as they were put in. solved: matrices that were handed over to be worked on.
    """

    filled: list[Slice]
    applied: list[Slice]
    returned: bool
    whole: bool
    solved: list[int]
    digest: str
    sent_bytes: int
    planned_bytes: int
    result: Tensor


def exchange_all(rank: int, world_size: int) -> list[Seen]:
    return [_exchange(make_case(number, world_size), rank, world_size) for number in range(CASES)]


def _exchange(case: Case, rank: int, world_size: int) -> Seen:
    """Send known numbers to the owners and let them come back, once as they are and once worked on."""
    plan = case.plan()
    comm = Comm.of_group(dist.group.WORLD)
    exchange = Exchange(plan, comm, device())
    flat = torch.full((case.unit.partition_numel,), -1.0, device=device())
    for piece in case.unit.slices(rank):
        flat[piece.offset : piece.offset + piece.numel] = _numbers(piece.param, case)[piece.start :][: piece.numel]
    back = torch.full_like(flat, -1.0)
    seen = Seen([], [], True, True, [], plan.digest(), 0, 0, back)

    def fill(piece: Slice, messages: Sequence[Tensor]) -> None:
        seen.filled.append(piece)
        (message,) = messages
        message.copy_(flat[piece.offset : piece.offset + piece.numel])

    def identity(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
        (stack,) = stacks
        for row in stack:
            param = int(row[0]) // 100 if case.dtype == torch.float32 else None
            known = [param] if param is not None else _alike(case, view)
            matches = [p for p in known if torch.equal(row, _numbers(p, case).to(case.dtype))]
            seen.whole &= bool(matches)
            seen.solved += matches[:1]
        return [stack]

    def apply(piece: Slice, results: Sequence[Tensor]) -> None:
        seen.applied.append(piece)
        back[piece.offset : piece.offset + piece.numel] = results[0].float()

    exchange.run(fill, identity, apply)
    seen.returned = torch.equal(back, flat.to(case.dtype).float())
    seen.sent_bytes = comm.sent_bytes
    seen.planned_bytes = plan.sent_bytes(rank)
    exchange.run(fill, _work, apply)
    seen.filled, again = seen.filled[: len(seen.filled) // 2], seen.filled[len(seen.filled) // 2 :]
    assert again == seen.filled, "fill must be called in the same order on every run"
    seen.result = back.cpu()
    return seen


def _numbers(param: int, case: Case) -> Tensor:
    """Integers below 256, exact in bfloat16 too: in fp32 they tell the parameter and the element."""
    count = torch.arange(case.unit.params[param].numel, device=device())
    return (100 * param + count).float() if case.dtype == torch.float32 else ((17 * param + 3 * count) % 251).float()


def _alike(case: Case, view: MatrixView) -> list[int]:
    return [param for param, spec in enumerate(case.unit.params) if spec.shape == view.shape]


def _work(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Something that every element of a matrix enters, to be had unsharded as well."""
    return [torch.stack([_work_alone(row) for row in stacks[0]])]


def _work_alone(flat: Tensor) -> Tensor:
    return (flat.double() * 0.5 + flat.double().sum()).to(flat.dtype)


@cache
def seen(world_size: int) -> list[tuple[Case, tuple[Seen, ...]]]:
    """Each case, and what every rank saw of it."""
    ranks = run_ranks(world_size, exchange_all)
    cases = [make_case(number, world_size) for number in range(CASES)]
    return list(zip(cases, zip(*ranks, strict=True), strict=True))


def each(world_size: int) -> Iterator[tuple[Case, int, Seen]]:
    for case, ranks in seen(world_size):
        for rank, one in enumerate(ranks):
            yield case, rank, one


sizes = pytest.mark.parametrize("world_size", [3, 4])


@sizes
def test_what_goes_out_comes_back(world_size: int) -> None:
    """Each slice is asked for once and answered once, with its own numbers."""
    for case, rank, one in each(world_size):
        slices = sorted(case.unit.slices(rank), key=lambda s: s.offset)
        assert sorted(one.filled, key=lambda s: s.offset) == slices
        assert sorted(one.applied[: len(slices)], key=lambda s: s.offset) == slices
        assert one.returned


@sizes
def test_owners_see_whole_matrices_each_once(world_size: int) -> None:
    for case, ranks in seen(world_size):
        assert all(one.whole for one in ranks)
        if case.dtype == torch.float32:
            assert sorted(p for one in ranks for p in one.solved) == list(range(len(case.unit.params)))
        assert sum(len(one.solved) for one in ranks) == len(case.unit.params)


@sizes
def test_results_are_those_of_the_whole_matrix(world_size: int) -> None:
    """Bit for bit what the same work on the unsharded matrix gives, wherever the slice lies."""
    for case, rank, one in each(world_size):
        for piece in case.unit.slices(rank):
            alone = _work_alone(_numbers(piece.param, case).cpu().to(case.dtype)).float()
            got = one.result[piece.offset : piece.offset + piece.numel]
            assert torch.equal(got, alone[piece.start : piece.start + piece.numel])


@sizes
def test_ranks_mean_the_same_plan_and_send_what_it_says(world_size: int) -> None:
    for _, ranks in seen(world_size):
        assert len({one.digest for one in ranks}) == 1
        assert [one.sent_bytes for one in ranks] == [one.planned_bytes for one in ranks]


@sizes
def test_padding_is_never_touched(world_size: int) -> None:
    for case, rank, one in each(world_size):
        inside = torch.zeros(case.unit.partition_numel, dtype=torch.bool)
        for piece in case.unit.slices(rank):
            inside[piece.offset : piece.offset + piece.numel] = True
        assert (one.result[~inside] == -1.0).all()


@sizes
def test_the_cases_are_of_every_kind(world_size: int) -> None:
    """Cut and whole matrices, several buckets, one larger than a bucket, ranks with nothing of a matrix."""
    plans = [case.plan() for case, _ in seen(world_size)]
    assert any(plan.buckets and any(plan.whole) for plan in plans)
    assert any(len(plan.buckets) > 2 for plan in plans)
    assert any(spec.numel > plan.bucket_elements for plan in plans for spec in plan.unit.params)
    assert any(len(batch) > 1 for plan in plans for batches in plan.whole for batch in batches)
    assert any(len(params) > 1 for plan in plans for bucket in plan.buckets for params in bucket.owned)
    assert any(0 < len(plan.unit.holders(0)) < world_size for plan in plans)
    assert {case.overlap for case, _ in seen(world_size)} == {True, False}


def overlap_both_ways(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """The results of random matrices with and without overlap."""
    pairs = []
    for number in range(CASES):
        case = make_case(number, world_size)
        values = torch.randn(case.unit.partition_numel, generator=torch.Generator().manual_seed(rank))
        overlapped, one_by_one = (replace(case, overlap=overlap) for overlap in (True, False))
        pairs.append((_run_once(overlapped, values, rank), _run_once(one_by_one, values, rank)))
    return pairs


def _run_once(case: Case, values: Tensor, rank: int) -> Tensor:
    exchange = Exchange(case.plan(), Comm.of_group(dist.group.WORLD), device())
    back = torch.zeros_like(values)

    def apply(piece: Slice, results: Sequence[Tensor]) -> None:
        back[piece.offset : piece.offset + piece.numel] = results[0].float().cpu()

    exchange.run(lambda piece, messages: messages[0].copy_(values[piece.offset :][: piece.numel]), _work, apply)
    return back


def test_overlap_changes_no_bit() -> None:
    for of_all_ranks in zip(*run_ranks(3, overlap_both_ways), strict=True):
        assert all(torch.equal(one, other) for one, other in of_all_ranks)
        assert any(one.any() for one, _ in of_all_ranks)


def two_there_one_back(rank: int, world_size: int) -> list[tuple[Tensor, int, int]]:
    """Directions in 16 bits and weights in 32 go to the owners, signs come back: (signs, bytes sent, bytes planned)."""
    found = []
    for number in range(CASES):
        case = replace(make_case(number, world_size), dtype=torch.bfloat16, shape=WEIGHT_BASIS)
        plan, comm = case.plan(), Comm.of_group(dist.group.WORLD)
        exchange = Exchange(plan, comm, device())
        back = torch.zeros(case.unit.partition_numel)

        def fill(piece: Slice, messages: Sequence[Tensor]) -> None:
            for message, values in zip(messages, _two(piece.param, device()), strict=True):
                message.copy_(values[piece.start : piece.start + piece.numel])

        def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
            assert [stack.dtype for stack in stacks] == [torch.bfloat16, torch.float32]
            return [torch.stack([_sign_of_both(*rows) for rows in zip(*stacks, strict=True)])]

        def apply(piece: Slice, results: Sequence[Tensor], back: Tensor = back) -> None:
            (result,) = results
            assert result.dtype == torch.int8
            back[piece.offset : piece.offset + piece.numel] = result.float().cpu()

        exchange.run(fill, solve, apply)
        found.append((back, comm.sent_bytes, plan.sent_bytes(rank)))
    return found


def _two(param: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of a parameter, exact in bfloat16, and others that need fp32; longer than any parameter."""
    generator = torch.Generator().manual_seed(param)
    return (
        torch.randint(-100, 100, (100_000,), generator=generator).float().to(where),
        torch.randn(100_000, generator=generator).to(where),
    )


def _sign_of_both(direction: Tensor, weights: Tensor) -> Tensor:
    return (direction.float() * weights - weights.mean()).sign().to(torch.int8)


def test_two_matrices_may_travel_and_a_result_of_another_dtype_come_back() -> None:
    ranks = run_ranks(3, two_there_one_back)
    for number in range(CASES):
        unit = make_case(number, 3).unit
        for rank, found in enumerate(ranks):
            back, sent, planned = found[number]
            assert sent == planned
            for piece in unit.slices(rank):
                both = [v[: unit.params[piece.param].numel] for v in _two(piece.param, torch.device("cpu"))]
                expected = _sign_of_both(*both)[piece.start : piece.start + piece.numel].float()
                assert torch.equal(back[piece.offset : piece.offset + piece.numel], expected)


def rows_there_and_back(rank: int, world_size: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """Matrices travel with a value for each row: (elements, rows, bytes sent, bytes planned) as they came back."""
    found = []
    for number in range(CASES):
        case = replace(make_case(number, world_size), shape=replace(POLAR, rows=True))
        plan, comm = case.plan(), Comm.of_group(dist.group.WORLD)
        back = [torch.zeros(case.unit.partition_numel), torch.zeros(_row_count(case.unit))]

        def fill(piece: Slice, messages: Sequence[Tensor], plan: ExchangePlan = plan) -> None:
            elements, rows = messages
            elements.fill_(piece.param + 1)
            first, last = ROWS.place(plan.views[piece.param], piece.start, piece.numel)
            rows.copy_(torch.arange(first, last) + 100 * piece.param)

        def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
            elements, rows = stacks
            assert rows.shape == (len(elements), view.rows)
            return [elements * 2, rows + elements[:, :1].float() * 1000]

        def apply(
            piece: Slice, results: Sequence[Tensor], plan: ExchangePlan = plan, back: list[Tensor] = back
        ) -> None:
            back[0][piece.offset : piece.offset + piece.numel] = results[0].float().cpu()
            before = _row_count(plan.unit, piece.param)
            first, last = ROWS.place(plan.views[piece.param], piece.start, piece.numel)
            back[1][before + first : before + last] = results[1].cpu()

        Exchange(plan, comm, device()).run(fill, solve, apply)
        found.append((back[0], back[1], comm.sent_bytes, plan.sent_bytes(rank)))
    return found


def _row_count(unit: Unit, params: int | None = None) -> int:
    return sum(spec.shape[0] for spec in unit.params[:params])


def test_values_of_rows_travel_with_their_matrix() -> None:
    """Each row's value is with one rank, reaches the owner in its place, and comes back there, counted to the byte."""
    ranks = run_ranks(3, rows_there_and_back)
    for number in range(CASES):
        unit = make_case(number, 3).unit
        expected = [
            torch.arange(spec.shape[0]) + 100 * param + 1000 * (param + 1) for param, spec in enumerate(unit.params)
        ]
        assert torch.equal(sum(found[number][1] for found in ranks), torch.cat(expected).float())
        for rank, found in enumerate(ranks):
            elements, _, sent, planned = found[number]
            assert sent == planned
            for piece in unit.slices(rank):
                assert (elements[piece.offset : piece.offset + piece.numel] == 2 * (piece.param + 1)).all()


def test_absent_parameters_are_left_alone_and_refused_where_others_wait() -> None:
    """Unsharded, a parameter without gradient is skipped; where a matrix is cut, no rank may leave."""
    whole = build_layout([[ParamSpec(name=n, shape=(2, 2)) for n in "ab"]], stage=0, world_size=1).units[0]
    exchange = Exchange(plan_exchange(whole, bucket_elements=100), Comm(), torch.device("cpu"))
    called: list[int] = []
    exchange.run(
        lambda piece, message: called.append(piece.param),
        lambda view, stacks: stacks,
        lambda piece, results: called.append(piece.param),
        absent=frozenset({0}),
    )
    assert called == [1, 1]
    cut = build_layout([[ParamSpec(name="a", shape=(2, 2))]], stage=3, world_size=2).units[0]
    exchange = Exchange(plan_exchange(cut, bucket_elements=100), Comm(), torch.device("cpu"))
    with pytest.raises(ValueError, match="no other rank"):
        exchange.run(lambda p, m: None, lambda v, s: s, lambda p, r: None, absent=frozenset({0}))
