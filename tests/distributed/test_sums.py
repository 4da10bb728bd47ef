"""Sums, minima and maxima over whole parameters do not depend on where borders cut them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import ParamSpec, Slice, Unit, build_layout
from ds_optim.sharding.sums import reduce_parameters, rounded_once, square_sum
from tests.tiers import cells

from .harness import run_ranks

SHAPES = [(37, 24), (48, 24), (1, 24), (7,), (5, 7), (24, 72), (1,), (130, 99)]
PLACES = {"z1": (1, None), "z3": (3, None), "z3-sub_groups": (3, 300)}


def units(place: str, world_size: int) -> tuple[Unit, ...]:
    stage, size = PLACES[place]
    specs = [ParamSpec(name=f"p{number}", shape=shape) for number, shape in enumerate(SHAPES)]
    return build_layout([specs], stage=stage, world_size=world_size, sub_group_size=size).units


def values_of(name: str) -> Tensor:
    """Flat fp32 values of a parameter over six orders of magnitude, the same on every rank."""
    number = int(name[1:])
    generator = torch.Generator().manual_seed(number)
    count = ParamSpec(name=name, shape=SHAPES[number]).numel
    return torch.randn(count, generator=generator) * 10 ** (6 * torch.rand(count, generator=generator) - 3)


@dataclass
class Reduced:
    """For each parameter (sum of squares, sum), minimum and maximum, rounded to fp32; and bytes sent."""

    sums: Tensor
    least: Tensor
    most: Tensor
    sent_bytes: int


def reduce_all(rank: int, world_size: int) -> dict[str, Reduced]:
    """At every place; on every rank."""
    return {place: _reduce(place, rank, world_size) for place in PLACES}


def _reduce(place: str, rank: int, world_size: int) -> Reduced:
    comm = Comm.of_group(dist.group.WORLD if world_size > 1 else None)
    columns: dict[str, list[Tensor]] = {"sum": [], "min": [], "max": []}
    for unit in units(place, world_size):
        held = partial(_held, unit)
        squares = reduce_parameters(unit, comm, lambda s, v=held: (square_sum(v(s)), v(s).double().sum()), columns=2)
        assert squares.dtype == torch.float64
        columns["sum"].append(squares)
        columns["min"].append(reduce_parameters(unit, comm, lambda s, v=held: [v(s).min()], columns=1, op="min"))
        columns["max"].append(reduce_parameters(unit, comm, lambda s, v=held: [v(s).max()], columns=1, op="max"))
    joined = {op: torch.cat(parts).float() for op, parts in columns.items()}
    return Reduced(joined["sum"], joined["min"].flatten(), joined["max"].flatten(), comm.sent_bytes)


def _held(unit: Unit, piece: Slice) -> Tensor:
    return values_of(unit.params[piece.param].name)[piece.start : piece.start + piece.numel]


@cache
def reduced(world_size: int) -> list[dict[str, Reduced]]:
    return run_ranks(world_size, reduce_all)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world_size", cells([2, 3], [1, 4]))
def test_reductions_are_those_of_the_whole_parameter(world_size: int, place: str) -> None:
    """numpy in fp64 over the unsharded values, rounded to fp32: to the bit, on every rank."""
    whole = [values_of(f"p{number}").double().numpy() for number in range(len(SHAPES))]
    for rank in reduced(world_size):
        one = rank[place]
        expected = [[np.float32((v**2).sum()), np.float32(v.sum())] for v in whole]
        assert one.sums.tolist() == [[float(a), float(b)] for a, b in expected]
        assert one.least.tolist() == [float(v.min()) for v in whole]
        assert one.most.tolist() == [float(v.max()) for v in whole]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world_size", cells([2], [1, 4]))
def test_eight_bytes_a_number_travel(world_size: int, place: str) -> None:
    """One small all-reduce a unit and call, and none on one rank."""
    numbers = len(SHAPES) * (2 + 1 + 1)
    expected = 8 * numbers if world_size > 1 else 0
    assert [rank[place].sent_bytes for rank in reduced(world_size)] == [expected] * world_size


def test_borders_cut_what_is_summed() -> None:
    for world_size in (2, 3, 4):
        for place in PLACES:
            counts = [len(u.holders(p)) for u in units(place, world_size) for p in range(len(u.params))]
            assert max(counts) > 1
            assert min(counts) == 1
    assert len(units("z3-sub_groups", 3)) > 2


def test_a_rank_that_holds_nothing_adds_nothing() -> None:
    """The last of 8 ranks holds none of 4 elements: it contributes the identity."""
    unit = Unit(group=0, params=(ParamSpec(name="p0", shape=(4,)),), cut="each", world_size=8)
    assert list(unit.slices(7)) == []

    class Alone(Comm):
        def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
            return values

    rows = {op: reduce_parameters(unit, Alone(7, 8), lambda s: [1.0], columns=1, op=op) for op in ("sum", "min", "max")}
    assert {op: row.item() for op, row in rows.items()} == {"sum": 0.0, "min": float("inf"), "max": float("-inf")}


def test_a_sum_is_rounded_to_what_every_order_of_addition_agrees_on() -> None:
    """To the 24 bits of fp32, at any size that fp64 has."""
    for size in (1.0, 2.0**-300, 2.0**300):
        assert rounded_once(size * (1 + 2.0**-30)) == rounded_once(size * (1 - 2.0**-30)) == size
        assert rounded_once(size * (1 + 2.0**-23)) == size * (1 + 2.0**-23)


def test_square_sum_in_chunks() -> None:
    """More than one chunk, in fp64: no digit of fp32's is lost."""
    values = torch.randn((1 << 20) + 3, generator=torch.Generator().manual_seed(0))
    assert float(square_sum(values)) == pytest.approx(float((values.double().numpy() ** 2).sum()), rel=1e-13)
