"""The report of ``ds-optim memory``: savings against AdamW, where the bytes lie, and how far figures agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ds_optim.report.cells import BASELINE, group_of, merge_cells, peak_kinds, run_column, what_ran
from ds_optim.report.memory_csv import write_csv
from ds_optim.report.memory_plots import OWNER_COLOURS, HeatMap, SavingOverRanks
from ds_optim.report.plots import Bars, Plot
from ds_optim.report.render import Report, render
from ds_optim.report.schema import Row, RunInfo
from ds_optim.report.table import Cell, Column, Line, Table, TableSpec
from ds_optim.report.units import fixed, percent_change, size

CSV = "results.csv"
_OWNERS_TITLE = "Peak per rank, and what of it are model states"
_OWNERS = ("weights", "gradients", "master", "state")
#: What else a peak is of, as the estimate counts it, and how it is called.
_REST = {
    "activations": "activations",
    "logits": "logits",
    "gathered": "gathered layers",
    "buckets": "buckets",
    "step": "scratch of the step",
}


def render_memory(rows: Sequence[Row], info: RunInfo, out_dir: Path) -> Report:
    """Write ``report.md``, ``report.html``, ``plots/`` and ``results.csv``; repeats of a cell become one row."""
    merged = with_savings(merge_repeats(rows))
    write_csv(merged, out_dir / CSV)
    differences, causes = reconciliation(merged)
    ran, *how_to_read = summary(merged)
    info = info.model_copy(update={"notes": [*how_to_read, *info.notes, *causes]})
    return render(
        merged,
        info,
        out_dir,
        _table_spec(merged),
        plots=memory_plots(merged),
        summary=[*memory_answers(merged), ran],
        tables={"Differences between what was estimated, accounted and measured": differences},
    )


def merge_repeats(rows: Sequence[Row]) -> list[Row]:
    """One row a cell: of its repeats the median peak, least and most of all."""
    return merge_cells(rows, _merged)


def with_savings(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``extra["saving"]``: bytes less than AdamW in the same run at the same ranks and stage, if it ran."""
    base = {group_of(row): row for row in rows if row.status == "ok" and row.optimizer.lower() == BASELINE}
    found = []
    for row in rows:
        other = base.get(group_of(row))
        saving: dict[str, Any] | None = None
        if row.status == "ok" and other is not None and other is not row:
            sizes = {name: (int(read(other) or 0), int(read(row) or 0)) for name, read in _SIZES.items()}
            saving = {name: theirs - own for name, (theirs, own) in sizes.items()}
            percent = {name: 100 * (1 - own / theirs) if theirs else 0.0 for name, (theirs, own) in sizes.items()}
            saving = {**saving, "percent": percent}
        found.append(row.model_copy(update={"extra": {**row.extra, "saving": saving}}))
    return found


_SIZES: dict[str, Callable[[Row], Any]] = {
    "optimizer state": lambda row: row.extra["optimizer_state_bytes"],
    "model states": lambda row: row.model_state_bytes,
    "peak": lambda row: row.peak_bytes,
}


def _merged(repeats: Sequence[Row]) -> Row:
    first = repeats[0]
    peaks = [row.peak_bytes for row in repeats if row.peak_bytes is not None]
    every = [entry for row in repeats for entry in row.extra["peaks"]]
    spread = {"min": min(e["min"] for e in every), "max": max(e["max"] for e in every)}
    extra = {**first.extra, "repeats": len(repeats), "peak_spread": spread, "wall_s": None}
    extra["first_step_peak"] = max(row.extra["first_step_peak"] for row in repeats)
    return first.model_copy(update={"peak_bytes": int(median(peaks)), "extra": extra})


def _spread(row: Row) -> str:
    spread = row.extra.get("peak_spread")
    if spread is None:
        return ""
    low, high, where = size(spread["min"]), size(spread["max"]), f"rank {row.extra['peak_rank']}"
    return where if low == high else f"{low} to {high}, {where}"


def _saved(name: str) -> Column:
    def amount(row: Row) -> float | None:
        saving = row.extra.get("saving")
        return None if saving is None else float(saving[name])

    def share(row: Row) -> str:
        return f"{fixed(row.extra['saving']['percent'][name], 1)} %"

    return Column(title=f"Saved of {name}", value=amount, text=size, detail=share)


def _table_spec(rows: Sequence[Row]) -> TableSpec:
    keys = [
        *run_column(rows),
        Column(title="Optimizer", value=lambda row: row.label),
        Column(title="Stage", value=lambda row: row.stage),
        Column(title="Ranks", value=lambda row: row.ranks),
    ]
    return TableSpec(
        columns=(
            *keys,
            *(_saved(name) for name in reversed(_SIZES)),
            Column(title="State B/param", value=lambda r: r.state_bytes_per_param, text=lambda v: fixed(v, 2)),
            Column(title="State/rank", value=lambda row: row.extra.get("optimizer_state_bytes"), text=size),
            Column(title="Model states/rank", value=lambda row: row.model_state_bytes, text=size),
            Column(title="Peak/rank", value=lambda row: row.peak_bytes, text=size, detail=_spread),
            Column(title="First step", value=lambda row: row.extra.get("first_step_peak"), text=size),
            Column(title="RSS/rank", value=lambda row: row.rss_peak_bytes, text=size),
        ),
        group=group_of,
        baseline_name="AdamW",
        key_columns=len(keys),
    )


def memory_answers(rows: Sequence[Row]) -> list[str]:
    """What each optimizer saves, a sentence a stage, and how much of a peak that can be at all."""
    found = []
    for base in (row for row in rows if row.status == "ok" and row.optimizer.lower() == BASELINE and row.peak_bytes):
        alike: dict[str, list[str]] = {}
        for row in rows:
            if group_of(row) == group_of(base) and row.extra.get("saving"):
                alike.setdefault(_saving_in_words(row), []).append(row.label)
        saved = [f"{', '.join(who)} save{'s' if len(who) == 1 else ''} {what}" for what, who in alike.items()]
        if saved:
            share = (base.model_state_bytes or 0) / (base.peak_bytes or 1)
            found.append(
                f"{_group_title(base, rows)} against AdamW: {'; '.join(saved)}. Of AdamW's peak {share:.0%} are model "
                f"states; the rest is {_rest_in_words(base)}, which no optimizer changes."
            )
    return found


def _rest_in_words(row: Row) -> str:
    """What a peak is of beside model states, with sizes where they were estimated at the peak."""
    at_peak = row.extra["estimate"].get("at_peak")
    if at_peak is None:
        return "activations, logits, gathered layers and buckets"
    return ", ".join(f"{label} {size(at_peak[name])}" for name, label in _REST.items() if at_peak.get(name))


def _saving_in_words(row: Row) -> str:
    """Of peak first."""
    saving = row.extra["saving"]
    parts = [f"{size(saving[name])} of {name} ({fixed(saving['percent'][name], 1)} %)" for name in reversed(_SIZES)]
    return ", ".join(parts)


def summary(rows: Sequence[Row]) -> list[str]:
    """What was run and how the figures are to be read."""
    lines = [what_ran(rows)]
    if any(row.extra.get("saving") for row in rows):
        lines[0] += " Savings are against AdamW in the same run, at the same stage and number of ranks."
    else:
        lines[0] += " No savings are shown, because AdamW did not run: add adamw to --optimizers."
    kinds = peak_kinds(rows)
    if kinds:
        lines.append(
            f"Peaks are those of {kinds} in a steady step, the median of the steps and process groups;"
            " beneath, the least and the most of any rank, and the fullest rank. The first step's peak, when state is"
            " made, stands apart. Sizes are of the rank that holds most."
        )
    flagged = sum(line["flagged"] for row in rows for line in row.extra.get("reconciliation", ()))
    lines.append(
        "Each estimate lies within 2 % of what was counted, and that of what was measured."
        if flagged == 0
        else f"{flagged} figures differ by more than 2 %: the second table says which and why."
    )
    return lines


def reconciliation(rows: Sequence[Row]) -> tuple[Table, list[str]]:
    """Of each cell, estimated minus accounted and accounted minus measured; and why, each cause with its letter."""
    letters: dict[str, str] = {}
    ran = [row for row in rows if row.extra.get("reconciliation")]
    first = ran[0].extra["reconciliation"] if ran else []
    titles = ["Optimizer", "Stage", "Ranks", *(f"{entry['what']}: {' − '.join(entry['sides'])}" for entry in first)]
    lines: list[Line] = []
    for number, row in enumerate(ran):
        cells = [Cell(text=row.label, numeric=False), Cell(text=str(row.stage)), Cell(text=str(row.ranks))]
        causes = []
        for entry in row.extra["reconciliation"]:
            left, right = (entry[side] for side in entry["sides"])
            verdict: Literal["worse", ""] = "worse" if entry["flagged"] else ""
            cells.append(Cell(text=size(entry["difference"]), change=percent_change(left, right), verdict=verdict))
            if entry["flagged"]:
                cause = f"{entry['what']}: {entry['cause']}"
                causes.append(letters.setdefault(cause, _letter(len(letters))))
        cells.append(Cell(text=", ".join(causes), numeric=False))
        lines.append(Line(cells=cells, starts_group=bool(number) and group_of(row) != group_of(ran[number - 1])))
    table = Table(titles=[*titles, "Cause"], lines=lines, unmeasured=(), key_columns=3)
    return table, [f"Cause {letter}: {cause}" for cause, letter in letters.items()]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def memory_plots(rows: Sequence[Row]) -> list[Plot]:
    """Stacked bars, a map over ranks, and the saving over the number of ranks."""
    ran = [row for row in rows if row.status == "ok"]
    if not ran:
        return []
    groups: dict[str, list[tuple[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_group_title(row, rows), []).append((row.label, _parts(row) if row.status == "ok" else None))
    columns = max((row.extra["peaks"] for row in ran), key=len)
    hosts = len({entry["host"] for entry in columns}) > 1
    plots: list[Plot] = [
        Bars(name="owners", title=_OWNERS_TITLE, groups=groups, text=size, parts=OWNER_COLOURS),
        HeatMap(
            name="ranks",
            title="Peak of each rank",
            rows=[f"{row.label}, {_group_title(row, rows)}" for row in ran],
            columns=[f"{e['host']}: {e['rank']}" if hosts else f"rank {e['rank']}" for e in columns],
            values=[[entry["median"] for entry in row.extra["peaks"]] for row in ran],
            text=size,
        ),
    ]
    saving = _saving(ran)
    return plots if saving is None else [*plots, saving]


def _group_title(row: Row, rows: Sequence[Row]) -> str:
    """The stage, and what else not all rows share."""
    parts = [f"ZeRO-{row.stage}"]
    if len({other.ranks for other in rows}) > 1:
        parts.append(f"{row.ranks} ranks")
    if len({other.run for other in rows}) > 1:
        parts.append(row.run)
    return ", ".join(parts)


def _parts(row: Row) -> dict[str, float]:
    """What was counted of model states, what the estimate says of the rest at the peak, and what is left of it."""
    at_peak = row.extra["estimate"].get("at_peak", {})
    parts = {name: float(row.extra["owners"][name]) for name in _OWNERS}
    parts["gradients"] = float(at_peak.get("gradients", parts["gradients"]))
    parts |= {label: float(at_peak[name]) for name, label in _REST.items() if at_peak.get(name)}
    return {**parts, "the rest of the peak": max(0.0, (row.peak_bytes or 0) - sum(parts.values()))}


def _saving(rows: Sequence[Row]) -> SavingOverRanks | None:
    """The estimate's curves, and what was counted; None where there is nothing to compare with."""
    base = {group_of(row): row for row in rows if row.optimizer.lower() == BASELINE}
    saved: dict[str, tuple[float, list[tuple[int, float]]]] = {}
    shares: dict[tuple[str, int], list[tuple[int, float]]] = {}
    measured: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        other = base.get(group_of(row))
        if other is None or other is row or not row.stage:
            continue
        formula = _bytes_a_parameter(other) - _bytes_a_parameter(row)
        absolute = row.extra["saving"]["optimizer state"] / row.extra["parameters"]
        saved.setdefault(row.label, (round(formula, 2), []))[1].append((row.ranks, absolute))
        own, theirs = row.extra["model_states_over_ranks"], other.extra["model_states_over_ranks"]
        shares[row.label, row.stage] = [(int(n), 100 * (1 - own[n][0] / theirs[n][0])) for n in own if n in theirs]
        percent = row.extra["saving"]["percent"]["model states"]
        measured.setdefault((row.label, row.stage), []).append((row.ranks, percent))
    if not saved:
        return None
    title = "What is saved against AdamW: formula (lines) and count (points)"
    return SavingOverRanks(name="saving", title=title, saved=saved, shares=shares, measured=measured)


def _bytes_a_parameter(row: Row) -> float:
    return row.state_bytes_per_param or 0.0
