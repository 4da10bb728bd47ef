"""One renderer for every command and benchmark: Markdown with PNG plots, and one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds_optim.machine.files import write_atomic
from ds_optim.report.plots import Plot, colour_map, draw
from ds_optim.report.schema import Row, RunInfo
from ds_optim.report.table import Table, TableSpec, build_table, markdown_text, to_markdown

MARKDOWN = "report.md"
HTML = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was rendered, and where it lies."""

    table: Table
    markdown: Path
    html: Path


def render(
    rows: Sequence[Row],
    info: RunInfo,
    out_dir: Path,
    table_spec: TableSpec,
    *,
    plots: Sequence[Plot] = (),
    summary: Sequence[str] = (),
    tables: Mapping[str, Table] | None = None,
) -> Report:
    """Write ``report.md`` (with ``plots/*.png``) and ``report.html`` into ``out_dir``.

    Args:
        rows: what was run, in the order of the table; failed rows show their reason.
        info: title, command, machine and settings.
        out_dir: an existing, writable folder.
        table_spec: columns and baseline; columns that no row measured are named beneath the table instead.
        plots: drawn in this order; an optimizer has the same colour in each.
        summary: lines that stand above the table.
        tables: more tables by their titles, beneath the plots.
    """
    table = build_table(rows, table_spec)
    if table.unmeasured:
        note = f"Not measured in this run: {', '.join(table.unmeasured)}."
        info = info.model_copy(update={"notes": [*info.notes, note]})
    colours = colour_map([row.label for row in rows])
    about = _rows_by_note(table)
    numbers = list(about)
    page = {
        "info": info,
        "table": table,
        "tables": tables or {},
        "plots": [draw(plot, out_dir, colours) for plot in plots],
        "summary": list(summary),
        "about": about,
        "marks": [", ".join(str(numbers.index(note) + 1) for note in line.notes) for line in table.lines],
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", info.command)), default=0)),
    }
    report = Report(table=table, markdown=out_dir / MARKDOWN, html=out_dir / HTML)
    for path in (report.markdown, report.html):
        text = templates().get_template(f"{path.name}.j2").render(page)
        write_atomic(path, text.rstrip("\n") + "\n")
    return report


@cache
def templates() -> Any:
    """The package's templates; what is put into HTML is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ds_optim.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= {"words": markdown_text, "markdown": lambda table: to_markdown(table).rstrip("\n")}
    return environment


def _rows_by_note(table: Table) -> dict[str, str]:
    """Each note with the rows that it is about: Markdown tables carry no marks."""
    about: dict[str, list[str]] = {}
    for line in table.lines:
        for note in dict.fromkeys(line.notes):
            about.setdefault(note, []).append(", ".join(cell.text for cell in line.cells[: table.key_columns]))
    return {note: "; ".join(rows) for note, rows in about.items()}
