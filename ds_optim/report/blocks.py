"""Tables that stand on end: a column for each thing compared, a line for each number, in lines of any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_NUMBER, _FRAME = 7, 3
"""Characters of a number at least, and of what stands around a cell."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What is compared, by its name (of several lines) and its cells, as many as there are labels."""

    name: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        return max(_NUMBER, *map(len, self.name.splitlines()), *map(len, self.cells)) + _FRAME


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
