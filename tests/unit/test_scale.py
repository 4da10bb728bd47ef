"""The curves of scale: what an exponent is, and when a row is worse than a kept one."""

from __future__ import annotations

import pytest

from benchmarks.scale.__main__ import exponents, growth, worse
from benchmarks.scale.cells import Cell, grid, row_of
from ds_optim.report.schema import Row


def rows(cell: Cell, **ms: float) -> list[Row]:
    found = {name: [{"ms": value, "first_ms": 2 * value}] * cell.ranks for name, value in ms.items()}
    return [
        Row(kind="scale", optimizer=name, stage=3, ranks=cell.ranks, extra=row_of(cell, name, by_rank))
        for name, by_rank in found.items()
    ]


def test_the_exponent_of_a_curve_is_that_of_its_last_step() -> None:
    assert growth([(1.0, 5.0), (4.0, 2.0), (2.0, 1.0)]) == 1.0
    small, middle, large = (Cell(axis="parameters", matrices=48, rows=n, ranks=2) for n in (64, 128, 256))
    known = rows(small, AdamW=9.0, Muon=1.0) + rows(middle, AdamW=2.0, Muon=3.0) + rows(large, AdamW=8.0, Muon=24.0)
    # four times the elements and the time; Muon's products are eight times as many, and so is its time
    assert exponents(known) == {("parameters", "AdamW"): pytest.approx(1), ("parameters", "Muon"): pytest.approx(1)}


def test_over_ranks_the_time_of_all_of_them_counts() -> None:
    one, two = (Cell(axis="ranks", matrices=48, rows=64, ranks=ranks) for ranks in (1, 2))
    assert exponents(rows(one, Lion=4.0) + rows(two, Lion=2.0)) == {("ranks", "Lion"): 0.0}
    assert exponents(rows(one, Lion=4.0) + rows(two, Lion=4.0)) == {("ranks", "Lion"): 1.0}


def test_a_larger_share_of_adamws_time_than_was_kept_is_named() -> None:
    cell = Cell(axis="tensors", matrices=10, rows=64, ranks=2)
    kept = rows(cell, AdamW=2.0, Lion=2.0, Muon=20.0)
    assert worse(rows(cell, AdamW=4.0, Lion=4.9, Muon=49.0), kept) == []  # a slower machine is none
    assert worse(rows(cell, AdamW=2.0, Lion=2.0, Muon=26.0), kept) == [
        "Muon, tensors, 10 x 64x128, 2 ranks: 13.00 of AdamW's, 10.00 before"
    ]


def test_the_grid_changes_one_thing_at_a_time() -> None:
    cells = grid((1, 100), (10, 10000), (1, 4))
    assert [cell.parameters / 1e6 for cell in cells] == pytest.approx([1, 100, 8, 8, 8, 8], rel=0.25)
    assert [cell.matrices for cell in cells] == [48, 48, 10, 10000, 48, 48]
    assert [cell.ranks for cell in cells] == [2, 2, 2, 2, 1, 4]
