"""Rows that a step takes: which they are, where they lie in every rank's slices, and what is done with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ds_optim
from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR
from ds_optim.matrix.views import MatrixView, selected_rows
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.selection import Chosen, Sums, add_row_sums, choose_rows, chosen_of

from .test_finished_factors import FP32, Views, matrices, stepped

FRACTION = 0.4
VIEW = {
    "whole": MatrixView(shape=(6, 9)),
    "conv": MatrixView(shape=(5, 2, 3)),
    "fused": MatrixView(shape=(12, 5), split=(8, 2, 2), heads=(2, 1, 1)),
    "turned": MatrixView(shape=(5, 8), transpose=True),
    "turned heads": MatrixView(shape=(3, 4, 6), transpose=True, batch_dims=1, heads=(2,)),
    "experts": MatrixView(shape=(3, 4, 7), batch_dims=1),
    "in turns": MatrixView(shape=(18, 4), split=(12, 6), interleave=2),
    "heads of turns": MatrixView(shape=(24, 5), split=(12, 12), interleave=2, heads=(4, 2)),
    "turns of heads": MatrixView(
        shape=(2, 5, 24), transpose=True, batch_dims=1, split=(16, 8), interleave=4, heads=(2, 4)
    ),
}
VALUES = {name: torch.randn(view.numel, generator=torch.Generator().manual_seed(1)) for name, view in VIEW.items()}


def by_turn(view: MatrixView, block: torch.Tensor) -> torch.Tensor:
    """A block (count, m, n) with the rows of each turn as matrices of their own: of each turn as many are chosen."""
    return block.reshape(-1, block.shape[1] // turns_of(view, len(block)), block.shape[2])


def turns_of(view: MatrixView, count: int) -> int:
    """In how many turns each of a block's matrices lies, of which a stack of experts has ``count``."""
    return max(1, view.interleave // (count // math.prod(view.shape[: view.batch_dims])))


def rows_by_hand(view: MatrixView, values: torch.Tensor) -> torch.Tensor:
    """Of each element whether its row is one of the largest of its matrix, or its turn in it."""
    marked = torch.zeros_like(values)
    blocks = []
    for block in view.unpack(values.clone()):
        out = torch.zeros_like(block)
        for matrix, flags in zip(by_turn(view, block), by_turn(view, out), strict=True):
            sizes = [float(row.abs().sum()) for row in matrix]
            for row in sorted(range(len(sizes)), key=lambda r: -sizes[r])[: math.ceil(FRACTION * len(sizes))]:
                flags[row] = 1
        blocks.append(out)
    view.pack_into(blocks, marked)
    return marked.bool()


def exchanges(stage: int, ranks: int, fraction: float = FRACTION) -> list[Exchange]:
    """Of every rank; none of them is run."""
    specs = [ParamSpec(name=name, shape=view.shape) for name, view in VIEW.items()]
    (unit,) = build_layout([specs], stage=stage, world_size=ranks).units
    plan = ExchangePlan(
        unit=unit,
        views=dict(enumerate(VIEW.values())),
        shape=POLAR,
        polar=PolarSpec().resolve(torch.device("cpu")),
        bucket_mb=1,
        overlap=True,
        stacked=False,
        fraction=fraction,
    )
    return [Exchange(plan, Comm(rank, ranks if stage else 1), torch.device("cpu")) for rank in range(unit.world_size)]


@pytest.mark.parametrize("name", VIEW)
def test_the_largest_rows_of_each_matrix_are_chosen(name: str) -> None:
    (exchange,) = exchanges(0, 1)
    sums = Sums(exchange, torch.device("cpu"))
    for number, (key, view) in enumerate(VIEW.items()):
        add_row_sums(view, 0, VALUES[key], sums.of[number])
    number = list(VIEW).index(name)
    chosen = choose_rows(exchange, sums)[number]
    (held,) = [held for held in exchange.plan.unit.slices(0) if held.param == number]
    assert torch.equal(chosen.mask(held), rows_by_hand(VIEW[name], VALUES[name]))
    view = VIEW[name].selected(FRACTION)
    blocks = [by_turn(view, block) for block in view.unpack(VALUES[name][chosen.mask(held)])]
    for block, every in zip(blocks, VIEW[name].unpack(VALUES[name]), strict=True):
        whole = by_turn(VIEW[name], every)
        assert block.shape[1] == math.ceil(FRACTION * whole.shape[1])
        for matrix, rows in zip(block, whole, strict=True):
            kept = [row for row in rows.tolist() if row in matrix.tolist()]
            assert matrix.tolist() == kept, "rows of another matrix, or out of their order"


@given(name=st.sampled_from(list(VIEW)), border=st.integers(0, 72))
def test_row_sums_of_slices_add_up(name: str, border: int) -> None:
    view, values = VIEW[name], VALUES[name]
    border = min(border, view.numel)
    sums = torch.zeros(view.of_rows.numel, dtype=torch.float64)
    add_row_sums(view, 0, values[:border], sums)
    add_row_sums(view, border, values[border:], sums)
    by_hand = torch.cat([b.double().abs().sum(dim=-1).flatten() for b in view.unpack(values)])
    assert sorted(sums.tolist()) == pytest.approx(sorted(by_hand.tolist()), rel=1e-12)


@settings(max_examples=30)
@given(stage=st.sampled_from((1, 3)), ranks=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_rank_finds_its_elements_of_chosen_rows(stage: int, ranks: int, seed: int) -> None:
    """Runs are where the mask says, meet without gaps, and what is sent for them is what arrives."""
    of_all = exchanges(stage, ranks)
    chosen = {}
    for number, view in enumerate(VIEW.values()):
        flags = torch.rand(view.of_rows.numel, generator=torch.Generator().manual_seed(seed + number))
        blocks = []
        for block in view.of_rows.unpack(flags):  # as many of each matrix
            turns = by_turn(view, block)[..., 0]
            order = turns.argsort(dim=1)[:, : selected_rows(turns.shape[1], FRACTION)]
            blocks.append(torch.zeros_like(turns).scatter_(1, order, 1.0).view(block.shape))
        view.of_rows.pack_into(blocks, flags)
        sums = torch.nn.functional.pad(flags.bool().cumsum(0), (1, 0))
        chosen[number] = Chosen(view, flags.bool(), sums)
    smaller = [chosen_of(exchange, chosen).plan for exchange in of_all]
    for number, view in enumerate(VIEW.values()):
        whole = of_all[0].plan.unit
        holders = whole.holders(number)
        mask = torch.cat([chosen[number].mask(held) for _, held in holders])
        assert int(mask.sum()) == view.selected(FRACTION).numel
        position = 0
        for rank, held in holders:
            run = smaller[0].unit.slice_of(number, rank)
            assert run is not None
            assert run.start == position
            assert run.numel == int(mask[held.start : held.start + held.numel].sum())
            position += run.numel
    for bucket in smaller[0].buckets:
        sent = [plan.sent_counts(bucket, rank) for rank, plan in enumerate(smaller)]
        received = [plan.received_counts(bucket, rank) for rank, plan in enumerate(smaller)]
        assert [list(column) for column in zip(*sent, strict=True)] == received


def test_a_plan_counts_a_fraction_of_what_travels_and_of_the_work() -> None:
    part, all_of_it = (exchanges(3, 3, fraction)[0].plan for fraction in (0.25, 1.0))
    bytes_of = [sum(plan.sent_bytes(rank) for rank in range(3)) for plan in (part, all_of_it)]
    assert bytes_of[0] == pytest.approx(bytes_of[1] / 4, rel=0.05)
    for param, view in part.views.items():
        turns = [turns_of(view, count) for count, _, _ in view.matrices()]
        rows = [t * selected_rows(m // t, 0.25) for t, (_, m, _) in zip(turns, view.matrices(), strict=True)]
        worked = [part.shape.cost(k, n, part.polar) * c for k, (c, _, n) in zip(rows, view.matrices(), strict=True)]
        assert part.costs[param] == sum(worked) < all_of_it.costs[param]


@pytest.mark.parametrize(("rows", "fraction", "count"), [(30, 0.1, 3), (5, 0.25, 2), (3, 0.01, 1), (7, 1.0, 7)])
def test_a_fraction_of_rows_is_rounded_up(rows: int, fraction: float, count: int) -> None:
    assert selected_rows(rows, fraction) == count


# ------------------------------------------------------------------------------------------------- the rule


def test_the_rows_that_are_left_gather_their_gradients() -> None:
    """Equal rows take turns: what is left waits, whole, until it is the largest."""
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    optimizer = ds_optim.Dion2(
        ds_optim.param_groups(model), lr=0.5, fraction=0.1, momentum=0.25, weight_decay=0.0, **FP32
    )
    moved = []
    for _ in range(3):
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        moved.append((model.weight.detach() != before).any(dim=1).nonzero().flatten().tolist())
    assert moved == [[0], [1], [2]]
    momentum = optimizer.state[model.weight]["exp_avg"]
    assert momentum[:, 0].tolist() == [2.25, 1.5, 0.75]


def test_all_rows_of_each_view_are_a_step_of_muon() -> None:
    """What momentum is divided by, orthogonalization does not see."""
    ours, theirs = Views(), Views()
    stepped("Dion2", ours, 5, lr=0.1, fraction=1.0, momentum=0.5, scale="spectral", weight_decay=0.1)
    stepped("Muon", theirs, 5, lr=0.1, momentum=0.5, nesterov=False, scale="spectral", weight_decay=0.1)
    for name, matrix in matrices(ours).items():
        assert torch.allclose(matrix, matrices(theirs)[name], atol=2e-5), name


def test_a_quarter_of_the_rows_of_each_view_moves_by_the_scale_of_the_whole() -> None:
    model = Views()
    before = matrices(model)
    stepped("Dion2", model, 1, lr=0.1, fraction=0.25, scale="unit_rms", weight_decay=0.0)
    for name, matrix in matrices(model).items():
        change = matrix - before[name]
        rows, columns = change.shape
        moved = change[change.any(dim=1)]
        assert len(moved) == math.ceil(rows / 4), name
        largest = float(torch.linalg.matrix_norm(moved, 2))
        # Newton-Schulz leaves singular values between 0.7 and 1.2; of the rows alone it would be half, at the most.
        assert 0.65 < largest / (0.1 * math.sqrt(rows / columns)) < 1.25, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0}, "write a number above 0 and at most 1"),
        ({"fraction": 1.5}, "write a number above 0 and at most 1"),
        ({"momentum_dtype": "bfloat16"}, 'write momentum_dtype "float32"'),
    ],
)
def test_what_it_cannot_do_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ds_optim.UserError, match=words):
        ds_optim.Dion2(ds_optim.param_groups(nn.Linear(3, 3)), **options)
