"""Cells of a comparison: their repeats made into one row each, their order, and the column that names runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from ds_optim.report.schema import Row
from ds_optim.report.table import Column

BASELINE = "adamw"
Key = TypeVar("Key", bound=Hashable)


def merge_cells(rows: Sequence[Row], of_repeats: Callable[[Sequence[Row]], Row]) -> list[Row]:
    """One row a cell, by run, ranks and stage; a cell of which a repeat failed has failed."""
    cells = grouped(rows, lambda row: (*group_of(row), row.optimizer, row.momentum_dtype))
    merged = []
    for repeats in cells.values():
        failed = next((row for row in repeats if row.status != "ok"), None)
        merged.append(of_repeats(repeats) if failed is None else failed.model_copy())
    return sorted(merged, key=lambda row: (row.run, row.ranks, -1 if row.stage is None else row.stage))


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by ``key``, groups and rows in the order in which they come."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def group_of(row: Row) -> tuple[Any, ...]:
    """What the cells share that are compared with each other."""
    return row.run, row.ranks, row.dtype, row.stage


def run_column(rows: Sequence[Row]) -> list[Column]:
    """The run's name, where there are several."""
    several = len({row.run for row in rows}) > 1
    return [Column(title="Run", value=lambda row: row.run)] if several else []


def what_ran(rows: Sequence[Row]) -> str:
    """How many cells ran."""
    return f"{sum(row.status == 'ok' for row in rows)} of {len(rows)} cells ran."


def peak_kinds(rows: Sequence[Row]) -> str:
    """What peaks count; empty where none was measured."""
    return ", ".join(sorted({row.peak_kind for row in rows if row.peak_kind}))
