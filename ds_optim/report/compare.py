"""The report of ``ds-optim compare``: its columns, its plots, and the sentences above the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ds_optim.report.cells import BASELINE, grouped, peak_kinds, run_column, what_ran
from ds_optim.report.compare_plots import compare_plots, title_of
from ds_optim.report.render import Report, render
from ds_optim.report.repeats import (
    ENOUGH_ROUNDS,
    OF_THIS_CELL,
    ends,
    loss_doubt,
    losses_by_seed,
    merge_repeats,
    rounds,
    time_doubt,
)
from ds_optim.report.schema import Row, RunInfo
from ds_optim.report.table import Column, Table, TableSpec, build_table
from ds_optim.report.units import MISSING, fixed, milliseconds, nats_more, significant, size, span


def _by_node(row: Row, where: str) -> float | None:
    """The mean over the nodes of what their interfaces sent; None for runs on one."""
    counted = [sent[where] for sent in row.extra.get("sent_by_node", {}).values()]
    return sum(counted) / len(counted) if counted else None


_COLUMNS = (
    Column(title="Optimizer", value=lambda row: row.label),
    Column(title="Stage", value=lambda row: row.stage),
    # One seed tells nobody which is better.
    Column(
        title="Val loss",
        value=lambda row: row.val_loss,
        text=lambda v: fixed(v, 3),
        compare=True,
        lower_is_better=None,
        change=nats_more,
        detail=lambda row: span(*ends(losses_by_seed(row).values()), decimals=3),
        doubt=loss_doubt,
    ),
    Column(title="lr, decay", value=lambda row: rates(row) or None),
    Column(
        title="Time/step",
        value=lambda row: row.ms_per_step,
        text=milliseconds,
        compare=True,
        detail=lambda row: span(row.ms_low, row.ms_high),
        doubt=time_doubt,
    ),
    Column(
        title="Tokens/s",
        value=lambda row: row.tokens_per_s,
        text=lambda v: significant(v) if v < 100 else f"{v:,.0f}",
        lower_is_better=False,
    ),
    Column(title="State B/param", value=lambda r: r.state_bytes_per_param, text=lambda v: fixed(v, 2), compare=True),
    Column(title="Model states/rank", value=lambda row: row.model_state_bytes, text=size, compare=True),
    Column(title="Peak/rank", value=lambda row: row.peak_bytes, text=size, compare=True),
    Column(title="RSS/rank", value=lambda row: row.rss_peak_bytes, text=size),
    Column(title="Sent/rank/step", value=lambda row: row.wire_bytes_per_step, text=size, compare=True),
)
_RATES = ("lr", "weight_decay")
#: Of the table's columns, those of a sentence.
_ANSWERS = {"Model states/rank": "model states", "Peak/rank": "peak", "Time/step": "time", "Val loss": "loss"}
_NODE_COLUMNS = (
    Column(title="Inside a node/step", value=lambda row: _by_node(row, "inside"), text=size),
    Column(title="Between nodes/step", value=lambda row: _by_node(row, "between"), text=size, compare=True),
)


_IN_TERMINAL = ("Optimizer", "Stage", "Val loss", "Time/step", "Model states/rank", "Peak/rank")
"""As much as 80 columns hold; the report has the others."""


def terminal_table(rows: Sequence[Row]) -> Table:
    """What a terminal shows of a comparison."""
    merged = merge_repeats(rows)
    spec = table_spec(merged)
    runs = [column for column in spec.columns[: spec.key_columns] if column.title not in _IN_TERMINAL]
    kept = [column for column in spec.columns if column.title in _IN_TERMINAL]
    return build_table(merged, replace(spec, columns=(*runs, *kept)))


def table_spec(rows: Sequence[Row]) -> TableSpec:
    """The columns; a run's name, and what nodes sent, only where there are several."""
    runs = run_column(rows)
    nodes = _NODE_COLUMNS if any(row.extra.get("sent_by_node") for row in rows) else ()
    return TableSpec(
        columns=(*runs, *_COLUMNS, *nodes),
        group=lambda row: (row.run, row.ranks, row.stage),
        is_baseline=lambda row: row.optimizer == BASELINE,
        baseline_name="AdamW",
        key_columns=2 + len(runs),
    )


def render_compare(rows: Sequence[Row], info: RunInfo, out_dir: Path) -> Report:
    """Render a comparison: rows by stage, then in the order given; repeats of a cell become one row."""
    merged = merge_repeats(rows)
    ran, *how_to_read = compare_summary(merged)
    info = info.model_copy(update={"notes": [*how_to_read, *info.notes]})
    summary = [*compare_answers(merged), ran]
    return render(merged, info, out_dir, table_spec(merged), plots=compare_plots(merged), summary=summary)


def rates(row: Row) -> str:
    """The learning rate and decay of a row, and whether they were tuned for its model; empty where it does not say."""
    params = row.extra.get("optimizer_params")
    if not isinstance(params, dict):
        return ""
    given = [f"{params[key]:g}" if isinstance(params.get(key), (int, float)) else MISSING for key in _RATES]
    how = "tuned" if row.extra.get("tuned") else "given" if "lr" in params else "default"
    return how if given == [MISSING] * len(given) else f"{', '.join(given)} ({how})"


def compare_answers(rows: Sequence[Row]) -> list[str]:
    """What each optimizer is to AdamW, a sentence a stage, and what these figures cannot tell."""
    spec = table_spec(rows)
    found = []
    for stage, members in _by_group(rows, spec).items():
        base = next((row for row in members if spec.is_baseline(row)), None)
        others = [row for row in members if row is not base]
        if base is not None and others:
            found.append(f"{stage} against AdamW: {_sentence(others, base, spec)}.")
    if not found:
        return []
    return [*found, _how_far(rows)]


def _how_far(rows: Sequence[Row]) -> str:
    """What losses and times of so many seeds and rounds can tell."""
    steps = sorted({f"{row.steps:,}" for row in rows if row.steps is not None})
    seeds = max(len(losses_by_seed(row)) or 1 for row in rows)
    many = "one seed" if seeds == 1 else f"{seeds} seeds"
    length = f", {' or '.join(steps)} steps" if steps else ""
    said = f"Losses are of {many}{length}, each at its own learning rate: a smoke test, not a ranking."
    passes = max(rounds(row) for row in rows)
    if passes < ENOUGH_ROUNDS:
        times = "one pass" if passes == 1 else f"{passes} passes"
        said += (
            f" Times are of {times} over the cells, and a busy minute falls on some of them: all differences are "
            f'"about"; --repeat {ENOUGH_ROUNDS} tells them from noise, with a seed a pass.'
        )
    return said


def _by_group(rows: Sequence[Row], spec: TableSpec) -> dict[str, list[Row]]:
    groups = grouped((row for row in rows if row.status == "ok"), spec.group)
    return {title_of(members[0].run, members[0].stage): members for members in groups.values()}


def _sentence(others: Sequence[Row], base: Row, spec: TableSpec) -> str:
    """What is the same of all others once, then what each of them has beside."""
    said = [_against(row, base, spec) for row in others]
    alike = [part for part in said[0] if len(others) > 1 and all(part in parts for parts in said)]
    own = [[part for part in parts if part not in alike] for parts in said]
    each = [f"{row.label}: {', '.join(parts)}" for row, parts in zip(others, own, strict=True) if parts]
    return "; ".join([f"{', '.join(alike)} for all", *each] if alike else each)


def _against(row: Row, base: Row, spec: TableSpec) -> list[str]:
    """What was measured of both, in words."""
    columns = {column.title: column for column in spec.columns}
    found = []
    for title, words in _ANSWERS.items():
        column = columns[title]
        value, reference = column.value(row), column.value(base)
        if isinstance(value, (int, float)) and isinstance(reference, (int, float)):
            doubt = "" if column.doubt is None else column.doubt(row, base)
            why = f", {doubt}" if doubt in OF_THIS_CELL else ""
            unit = " nats" if column.change is nats_more else ""
            found.append(f"{words} {'about ' if doubt else ''}{column.change(value, reference)}{unit}{why}")
    return found


def compare_summary(rows: Sequence[Row]) -> list[str]:
    """What was run, what the changes are against, and how the loss is to be read."""
    lines = [what_ran(rows)]
    if any(row.optimizer == BASELINE and row.status == "ok" for row in rows):
        lines[0] += " Percentages are changes against AdamW at the same ZeRO stage."
    else:
        lines[0] += " AdamW did not run, so no changes are shown: add adamw to --optimizers."
    entropy = next((row.unigram_entropy for row in rows if row.unigram_entropy is not None), None)
    if entropy is not None:
        lines.append(
            f"Losses are in nats per token. Knowing the frequency of each token and nothing else costs {entropy:.3f}"
            " (the unigram entropy of the text)."
        )
    lines.append(
        "State bytes per parameter are summed over the ranks, without padding; at stage 0 every rank holds all of it."
        if any(row.stage == 0 for row in rows)
        else "State bytes per parameter are summed over the ranks, without padding."
    )
    kinds = peak_kinds(rows)
    if kinds:
        lines.append(
            f"Peak memory is that of {kinds}. Model states are weights, gradients, fp32 master weights"
            " and optimizer state, as held before the optimizer's step. Both are the largest over the ranks."
        )
    return lines
