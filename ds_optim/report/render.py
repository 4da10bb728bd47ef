"""One renderer for every command and benchmark: Markdown with PNG plots, and one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_optim.machine.files import write_atomic
from ds_optim.report.plots import DrawnPlot, Plot, colour_map, draw
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
    tables = tables or {}
    table = build_table(rows, table_spec)
    if table.unmeasured:
        note = f"Not measured in this run: {', '.join(table.unmeasured)}."
        info = info.model_copy(update={"notes": [*info.notes, note]})
    colours = colour_map([row.label for row in rows])
    drawn = [draw(plot, out_dir, colours) for plot in plots]
    footnotes = list(dict.fromkeys(note for line in table.lines for note in line.notes))
    marks = [", ".join(str(footnotes.index(note) + 1) for note in line.notes) for line in table.lines]
    report = Report(table=table, markdown=out_dir / MARKDOWN, html=out_dir / HTML)
    write_atomic(report.markdown, _markdown(info, table, drawn, footnotes, summary, tables))
    write_atomic(report.html, _html(info, table, drawn, footnotes, marks, summary, tables))
    return report


def _html(
    info: RunInfo,
    table: Table,
    plots: Sequence[DrawnPlot],
    footnotes: Sequence[str],
    marks: Sequence[str],
    summary: Sequence[str],
    tables: Mapping[str, Table],
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ds_optim.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        info=info, table=table, plots=plots, footnotes=footnotes, marks=marks, summary=summary, tables=tables
    )


def _markdown(
    info: RunInfo,
    table: Table,
    plots: Sequence[DrawnPlot],
    footnotes: Sequence[str],
    summary: Sequence[str],
    tables: Mapping[str, Table],
) -> str:
    head = [f"# {markdown_text(info.title)}", markdown_text(info.started), *map(markdown_text, summary)]
    parts = [*(line for line in head if line), "## Results", to_markdown(table)]
    notes = [*info.notes, *_marked_notes(table, footnotes)]
    if notes:
        parts.append("\n".join(f"- {markdown_text(note)}" for note in notes))
    if plots:
        parts += ["## Plots", *(f"![{markdown_text(plot.title)}]({plot.png})" for plot in plots)]
    for title, more in tables.items():
        parts += [f"## {markdown_text(title)}", to_markdown(more)]
    for title, facts in (("Settings", info.settings), ("Machine", info.machine)):
        if facts:
            parts += [f"## {title}", "\n".join(markdown_text(f"- {name}: {value}") for name, value in facts.items())]
    if info.command:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", info.command)), default=0))
        parts += ["## To reproduce", f"{fence}\n{info.command}\n{fence}"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _marked_notes(table: Table, footnotes: Sequence[str]) -> list[str]:
    """Each note with the rows that it is about: Markdown tables carry no marks."""
    marked = []
    for note in footnotes:
        about = [
            ", ".join(c.text for c in line.cells[: table.key_columns]) for line in table.lines if note in line.notes
        ]
        marked.append(f"{'; '.join(about)}: {note}")
    return marked
