"""Tables for a terminal of any width: those that are too wide stand on end, a column for each thing compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_optim.report.table import Cell, Line, to_rich
from ds_optim.report.table import Table as Results
from ds_optim.report.units import MISSING

if TYPE_CHECKING:
    from rich.table import Table

_NUMBER, _FRAME = 7, 3
"""Characters of a number at least, and of what stands around a cell."""
_MOST_COLUMNS, _WIDE = 6, 140
"""A table of more columns is shown as it is from so many characters on."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What is compared, by its name (of several lines) and its cells, as many as there are labels."""

    name: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        return max(_NUMBER, *(len(line) for text in (self.name, *self.cells) for line in text.splitlines())) + _FRAME


def to_terminal(table: Results, title: str, width: int) -> Iterator[Table]:
    """The table as it is where a line has room for it, else a block for each group of its lines, standing on end.

    A failed line has no numbers and is left out of such blocks: ``failures`` names it.
    """
    from rich.console import Console

    whole = to_rich(table, title)
    asked = Console(width=10_000).measure(whole).maximum
    if asked <= width and (width >= _WIDE or len(table.titles) <= _MOST_COLUMNS):
        yield whole
        return
    for lines in _groups([line for line in table.lines if not line.failure]):
        keys = list(zip(*(line.cells[: table.key_columns] for line in lines), strict=True))
        same = [len(lines) > 1 and len({cell.text for cell in cells}) == 1 for cells in keys]
        named = zip(table.titles, keys, same, strict=False)
        parts = [f"{name} {cells[0].text}" for name, cells, alike in named if alike and cells[0].text != MISSING]
        own = [cells for cells, alike in zip(keys, same, strict=True) if not alike]
        columns = [
            Column(
                name="\n".join(cells[i].text for cells in own if cells[i].text != MISSING),
                cells=[_in_lines(cell) for cell in line.cells[table.key_columns :]],
            )
            for i, line in enumerate(lines)
        ]
        yield from blocks(", ".join([title, *parts]), [table.titles[table.key_columns :]], columns, width)


def _groups(lines: Sequence[Line]) -> Iterator[list[Line]]:
    group: list[Line] = []
    for line in lines:
        if line.starts_group and group:
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def _in_lines(cell: Cell) -> str:
    """A cell with its change beneath it, and its detail."""
    return "\n".join(part for part in (cell.text, cell.change, cell.detail) if part)


def blocks(title: str, labels: Sequence[Sequence[str]], columns: Sequence[Column], width: int) -> Iterator[Table]:
    """One table, or several below each other where a line has no room for all columns.

    Args:
        labels: of the lines, by section.
        width: characters of a line.
    """
    from rich.table import Table

    left = width - max(len(label) for section in labels for label in section) - _FRAME - 1
    for some in _beside_each_other(columns, left):
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("", no_wrap=True)
        for column in some:
            table.add_column(column.name, justify="right", no_wrap=True, min_width=_NUMBER)
        lines = zip(*(column.cells for column in some), strict=True)
        for section in labels:
            for label in section:
                table.add_row(label, *next(lines))
            table.add_section()
        yield table


def _beside_each_other(columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Those that fit a line together, at least one."""
    some: list[Column] = []
    left = width
    for column in columns:
        if some and column.width > left:
            yield some
            some, left = [], width
        some.append(column)
        left -= column.width
    yield some
