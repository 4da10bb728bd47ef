"""Rows as they are measured: to the file at once, then to the terminal and beside the file as a table and a plot."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ds_optim.bench.answers import answers
from ds_optim.bench.tables import bars
from ds_optim.errors import UserError
from ds_optim.machine.kept_results import refuse
from ds_optim.report.blocks import to_terminal
from ds_optim.report.machine import describe_machine
from ds_optim.report.render import Report, render
from ds_optim.report.schema import Row, RunInfo, append_row, write_rows
from ds_optim.report.table import TableSpec, build_table

ROWS = "rows.jsonl"
_FILE_WIDTH = 120
_MOST_NAMES = 4
#: Of what a row carries, what is the same in all, and how it is called.
_SETTINGS = {
    "tokens": "Tokens a rank and step",
    "accumulation": "Micro-batches a step",
    "elements": "Elements",
    "device": "Device",
    "threads": "Threads",
}
_HOW = {
    "times": "Times are medians of cases that take turns, the quartiles beneath. × is the ratio to the time that the "
    'column names; where the quartiles meet, or there is one sample, it is "about" so much, and grey.',
    "wire_bytes": "Bytes are those that a rank hands to collectives, a mean over the ranks and steps; what passes a "
    "network interface is counted beside them where that is permitted.",
}


def stamp() -> dict[str, Any]:
    """What every row carries: the machine and the day."""
    return {"machine": describe_machine(), "date": datetime.now(timezone.utc).date().isoformat()}


def open_folder(out: Path | None, *, force: bool, rows: str = ROWS, held: Sequence[str] = (ROWS,)) -> None:
    """Make ``out`` and begin its file of ``rows`` anew, before anything is measured. ``held``: files of an earlier run.

    UserError where it cannot be written, or has rows of before that are not to be replaced by ``force``.
    """
    if out is None:
        return
    if not force:
        refuse(out, held, "add --force to replace it, or give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / rows, [])
    except OSError as problem:
        raise UserError(
            f"--out: cannot write {out} ({problem.strerror}); give a folder that you may write to"
        ) from None


def collect(rows: Iterable[Row], out: Path | None) -> list[Row]:
    """All rows, each kept in ``out`` as soon as it is there."""
    kept = []
    for row in rows:
        kept.append(row)
        if out is not None:
            append_row(out / ROWS, row)
    return kept


def show(title: str, rows: Sequence[Row], spec: TableSpec) -> None:
    """What came out and the table on the terminal; beneath it the limits, and why what was not measured was not."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    for line in answers(rows):
        console.print(line, markup=False, highlight=False)
    for table in to_terminal(build_table(rows, spec), title, console.width):
        console.print(table)
    for line in remarks(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(title: str, rows: Sequence[Row], spec: TableSpec, out: Path, command: str = "") -> Report:
    """``report.md`` and ``report.html``: what came out, what there is to draw, the table, and how it was measured."""
    plot = bars(rows)
    first = rows[0]
    info = RunInfo(
        title=title,
        command=command,
        started=first.extra["date"],
        machine={name: str(value) for name, value in first.extra["machine"].items()},
        settings={} if first.stage is None else {"Ranks": str(first.ranks)},
        notes=[_HOW["wire_bytes" if first.kind == "wire_bytes" else "times"], *remarks(rows)],
    )
    names = _SETTINGS if first.stage is None else {"shape": "Model", **_SETTINGS}
    given = {name: first.extra[key] for key, name in names.items() if key in first.extra}
    info.settings.update({name: f"{value:,}" if isinstance(value, int) else value for name, value in given.items()})
    unmarked = [row.model_copy(update={"notes": []}) for row in rows]  # the remarks name their rows
    return render(unmarked, info, out, spec, plots=[] if plot is None else [plot], summary=answers(rows))


def remarks(rows: Sequence[Row]) -> list[str]:
    """The machine's limits in this run, then each note with the rows it is about."""
    lines = []
    limits = next((row.extra["limits"] for row in rows if row.extra.get("limits")), None)
    if limits:
        in_place = limits.get("in_place_gb_s")
        other = f", {in_place:g} GB/s in place" if in_place else ""
        lines.append(f"Limits: copies {limits['copy_gb_s']:g} GB/s (read and written){other}{_matrix_rates(limits)}.")
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(_name(row))
    return lines + [f"{_listed(about)}: {note}" for note, about in notes.items()]


def _listed(names: Sequence[str]) -> str:
    """The first few of them, and how many more."""
    names = list(dict.fromkeys(names))
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _matrix_rates(limits: dict[str, Any]) -> str:
    best = {dtype: max(rates.values()) for dtype, rates in limits["matrix_tflops"].items() if rates}
    if not best:
        return ""
    return "; matrix products " + ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in best.items()) + " TFLOP/s"


def _name(row: Row) -> str:
    """A row in a few words."""
    place = row.extra.get("path") if row.stage is None else f"stage {row.stage}"
    shape = row.extra["shape"] if row.kind == "polar" else None
    dtype = row.dtype if row.kind == "polar" else None
    return " ".join(str(part) for part in (shape, row.optimizer, dtype, place) if part)
