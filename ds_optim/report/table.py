"""Rows of results made into a table: the same cells for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ds_optim.report.schema import Row
from ds_optim.report.units import MISSING, percent_change

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Value = float | int | str | None
_NO_CHANGE = (MISSING, "0 %", "×1.00")
_MARKDOWN = re.compile(r"[\\`*\[\]<|]")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: what it reads from a row and how that is written.

    Attributes:
        title: the header; a unit that is the same in every cell goes here.
        value: the cell's value; None is "not measured".
        text: the value in words; by default ``str``.
        compare: show the change in percent against the group's baseline row.
        lower_is_better: decides whether a change is marked better or worse; None marks neither.
        detail: a second, smaller line, such as a spread.
        change: of the value against the baseline's, in words, where that is not in percent.
        doubt: of a row and the baseline's, why their difference says nothing: the change is then "about" so much, and
            no better or worse; empty where it says something.
    """

    title: str
    value: Callable[[Row], Value]
    text: Callable[[float], str] | None = None
    compare: bool = False
    lower_is_better: bool | None = True
    detail: Callable[[Row], str] | None = None
    change: Callable[[float, float], str] = percent_change
    doubt: Callable[[Row, Row], str] | None = None


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table's columns, and which row of which group the others are compared with."""

    columns: Sequence[Column]
    group: Callable[[Row], Hashable] = lambda row: row.stage
    is_baseline: Callable[[Row], bool] = lambda row: False
    baseline_name: str = ""
    key_columns: int = 2


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands in one place of the table."""

    text: str
    change: str = ""
    verdict: Literal["better", "worse", ""] = ""
    detail: str = ""
    numeric: bool = True


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table; ``failure`` says why a failed row has no numbers."""

    cells: Sequence[Cell]
    failure: str = ""
    starts_group: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Header titles and lines, in the order of the rows; columns that no row measured are named in ``unmeasured``."""

    titles: Sequence[str]
    lines: Sequence[Line]
    unmeasured: Sequence[str]
    key_columns: int

    def kinds(self) -> list[str]:
        """How each column is set: as "key", or by what was measured in it as "words" or "number"."""
        found = ["key"] * self.key_columns
        for place in range(self.key_columns, len(self.titles)):
            cells = [line.cells[place] for line in self.lines if not line.failure]
            words = [not cell.numeric for cell in cells if cell.text != MISSING]
            found.append("words" if words and all(words) else "number")
        return found


def build_table(rows: Iterable[Row], spec: TableSpec) -> Table:
    """Lay rows out by ``spec``; a column that no row measured is left out and listed as unmeasured."""
    rows = list(rows)
    kept = [c for i, c in enumerate(spec.columns) if i < spec.key_columns or any(c.value(r) is not None for r in rows)]
    baselines = {spec.group(row): row for row in rows if row.status == "ok" and spec.is_baseline(row)}
    lines: list[Line] = []
    previous: Hashable = object()
    for row in rows:
        group = spec.group(row)
        keys, metrics = kept[: spec.key_columns], kept[spec.key_columns :]
        cells = [_cell(column, row, None) for column in keys]
        if row.status == "ok":
            base = baselines.get(group)
            cells += [_cell(column, row, None if base is row else base) for column in metrics]
        lines.append(
            Line(
                cells=cells,
                failure="" if row.status == "ok" else (row.reason or "no reason was recorded"),
                starts_group=bool(lines) and group != previous,
                notes=row.notes,
            )
        )
        previous = group
    unmeasured = [column.title for column in spec.columns if column not in kept]
    return Table(titles=[c.title for c in kept], lines=lines, unmeasured=unmeasured, key_columns=spec.key_columns)


def _cell(column: Column, row: Row, base: Row | None) -> Cell:
    value = column.value(row)
    if value is None:
        return Cell(text=MISSING)
    if isinstance(value, str):
        return Cell(text=value, numeric=False)
    text = column.text(value) if column.text else str(value)
    detail = column.detail(row) if column.detail else ""
    reference = column.value(base) if base is not None and column.compare else None
    if base is None or not isinstance(reference, (int, float)):
        return Cell(text=text, detail=detail)
    change = column.change(value, reference)
    verdict: Literal["better", "worse", ""] = ""
    if column.doubt is not None and column.doubt(row, base):
        change = f"about {change}" if change != MISSING else change
    elif column.lower_is_better is not None and change not in _NO_CHANGE:
        verdict = "better" if (value < reference) == column.lower_is_better else "worse"
    return Cell(text=text, change=change, verdict=verdict, detail=detail)


def to_markdown(table: Table) -> str:
    """A Markdown table; failures stand beneath it, as Markdown cannot span columns."""
    width = len(table.titles)
    aligns = ["---" if i < table.key_columns else "---:" for i in range(width)]
    lines = [_markdown_line(table.titles), _markdown_line(aligns)]
    failures = []
    for line in table.lines:
        cells = [_in_words(cell) for cell in line.cells]
        if line.failure:
            failures.append(f"- **{markdown_text(', '.join(cells))}**: {markdown_text(line.failure)}")
            cells += ["failed"] + [MISSING] * (width - len(cells) - 1)
        lines.append(_markdown_line(cells))
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join(lines) + "\n"


def _in_words(cell: Cell) -> str:
    """A cell in one line, its change and its detail in brackets."""
    more = "; ".join(part for part in (cell.change, cell.detail) if part)
    return f"{cell.text} ({more})" if more else cell.text


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in one line: no cell, link, code or HTML begins or ends in it."""
    return " ".join(_MARKDOWN.sub(r"\\\g<0>", text).split())


def to_rich(table: Table, title: str = "") -> RichTable:
    """The table for a terminal; a failed row says only that it failed, ``failures`` has the reasons."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    rich = RichTable(title=title or None, title_justify="left", header_style="bold")
    for index, name in enumerate(table.titles):
        rich.add_column(escape(name), justify="left" if index < table.key_columns else "right", no_wrap=index == 0)
    colours = {"better": "green", "worse": "red", "": "dim"}
    for line in table.lines:
        if line.starts_group:
            rich.add_section()
        texts = []
        for cell in line.cells:
            change = f"\n[{colours[cell.verdict]}]{cell.change}[/]" if cell.change else ""
            detail = f"\n[dim]{escape(cell.detail)}[/]" if cell.detail else ""
            texts.append(escape(cell.text) + change + detail)
        if line.failure:
            texts.append("[red]failed[/]")
        rich.add_row(*texts)
    return rich


def failures(table: Table) -> list[str]:
    """One line for each failed row: what it was, and why."""
    return [f"{', '.join(cell.text for cell in line.cells)}: {line.failure}" for line in table.lines if line.failure]
