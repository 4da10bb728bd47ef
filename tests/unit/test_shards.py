"""Shards of parameters that tensor parallelism cut, and the wholes that they are put together to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import ELEMENTS, POLAR, ROWS
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.held import peak_scratch
from ds_optim.sharding.layout import ParamSpec, Shard, Unit
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shards import ShardView
from tests.distributed.tensor_models import shard_of

SPEC = PolarSpec(steps=2, dtype="float32", method="standard").resolve(torch.device("cpu"))


def cut(shape: tuple[int, ...], dim: int, *parts: int, ranks: int = 2) -> Shard:
    """Each of the parts, which follow each other along ``dim``, cut evenly."""
    begins = [sum(parts[:number]) for number in range(len(parts))]
    pieces = tuple(
        tuple((begin + rank * part // ranks, part // ranks) for begin, part in zip(begins, parts, strict=True))
        for rank in range(ranks)
    )
    return Shard(whole=shape, dim=dim, pieces=pieces)


# (view of the whole, how it was cut)
CASES = {
    "rows": (MatrixView(shape=(8, 6)), cut((8, 6), 0, 8)),
    "columns": (MatrixView(shape=(8, 6)), cut((8, 6), 1, 6)),
    "columns of three ranks": (MatrixView(shape=(4, 9)), cut((4, 9), 1, 9, ranks=3)),
    "fused": (MatrixView(shape=(8, 6), split=(4, 2, 2), heads=(2, 1, 1)), cut((8, 6), 0, 4, 2, 2)),
    "rows, stored the other way": (MatrixView(shape=(6, 8), transpose=True), cut((6, 8), 1, 8)),
    "columns, stored the other way": (MatrixView(shape=(6, 8), transpose=True), cut((6, 8), 0, 6)),
    "experts": (MatrixView(shape=(4, 6, 2), batch_dims=1), cut((4, 6, 2), 0, 4)),
    "rows of experts": (MatrixView(shape=(3, 6, 2), batch_dims=1), cut((3, 6, 2), 1, 6)),
}


def views(name: str) -> list[ShardView]:
    whole, shard = CASES[name]
    shapes = [list(whole.shape) for _ in shard.pieces]
    for shape, size in zip(shapes, shard.sizes, strict=True):
        shape[shard.dim] = size
    return [ShardView.of_whole(whole, shard, tuple(shape)) for shape in shapes]


def shards_of(values: Tensor, name: str) -> Tensor:
    """(B, *whole) -> (ranks, B, values of a shard)."""
    shard = CASES[name][1]
    return torch.stack(
        [torch.stack([shard_of(one, shard, rank).flatten() for one in values]) for rank in range(len(shard.pieces))]
    )


@pytest.mark.parametrize("name", CASES)
def test_shards_make_the_whole_and_the_whole_its_shards(name: str) -> None:
    view, *_ = views(name)
    values = torch.randn(3, *view.whole.shape)
    shards = shards_of(values, name)
    assert torch.equal(view.joined(shards, ELEMENTS), values.flatten(1))
    assert torch.equal(view.parted(values.flatten(1), ELEMENTS), shards)


@pytest.mark.parametrize("name", CASES)
def test_values_of_rows_go_with_the_rows_that_a_shard_holds(name: str) -> None:
    """Of the row that an element is in, as the whole's view counts rows; cut columns leave each shard all of them."""
    view, *_ = views(name)
    rows = torch.randn(2, view.whole.of_rows.numel)
    spread = torch.stack([view.whole.spread(one, 0, view.whole.numel) for one in rows]).view(-1, *view.whole.shape)
    parts = view.parted(rows, ROWS)
    for own, part, elements in zip(views(name), parts, shards_of(spread, name), strict=True):
        for values, seen in zip(part, elements, strict=True):
            assert torch.equal(own.spread(values, 0, own.numel), seen)
    assert torch.equal(view.joined(parts, ROWS), rows)


@pytest.mark.parametrize("name", CASES)
def test_costs_and_scratch_are_those_of_the_whole(name: str) -> None:
    view, *_ = views(name)
    specs = ParamSpec(name="w", shape=view.shape, shard=view.shard), ParamSpec(name="w", shape=view.whole.shape)
    cut_up, whole = (
        ExchangePlan(
            unit=Unit(group=0, params=(spec,), cut="each", world_size=2),
            views={0: seen},
            shape=POLAR,
            polar=SPEC,
            bucket_mb=1,
            overlap=False,
            stacked=False,
        )
        for spec, seen in zip(specs, (view, view.whole), strict=True)
    )
    assert view.matrices() == view.whole.matrices()
    assert cut_up.costs == whole.costs
    assert cut_up.sizes == whole.sizes
    assert specs[0].whole_numel == specs[1].numel
    # A whole matrix is worked on wherever it comes together, and its messages lie beside it.
    assert peak_scratch(cut_up, 0) + peak_scratch(cut_up, 1) > peak_scratch(whole, 0)


def test_only_whose_shard_it_is_sets_ranks_apart() -> None:
    one, other = (Shard(whole=(4, 2), dim=0, pieces=(((0, 2),), ((2, 2),)), rank=rank) for rank in (0, 1))
    assert repr(one) == repr(other)
    assert one == other
    names = [ParamSpec(name="w", shape=(2, 2), shard=shard).noise_name for shard in (one, other)]
    assert names == ["w", "w/1"]
