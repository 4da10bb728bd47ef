"""``ds-optim compare``: the same training run under several optimizers and ZeRO stages, side by side in one report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

from ds_optim.machine.kept_results import RESULTS
from ds_optim.report.compare import compare_answers, render_compare, terminal_table
from ds_optim.report.machine import describe_machine
from ds_optim.report.repeats import merge_repeats
from ds_optim.report.schema import Row, RunInfo
from ds_optim.report.table import failures, to_rich
from ds_optim.report.units import milliseconds
from ds_optim.sweep.cells import Cell, CompareSettings, bucket_settings, plan_cells, reproduce
from ds_optim.sweep.launch import CellLauncher
from ds_optim.sweep.result import CellResult, RankSpeed, largest
from ds_optim.sweep.run import Sweep, run_sweep

__all__ = ["CompareSettings", "run_compare"]


def run_compare(settings: CompareSettings, launcher: CellLauncher | None = None) -> int:
    """Run every cell, then write ``results.jsonl`` and the report into ``settings.out``.

    Returns 0 if every cell ran, 1 if some failed: those are rows that say why. Raises ``UserError`` for a mistake in
    the settings, before the first cell starts.

    Args:
        launcher: how the ranks of a cell start; by default as processes of this machine.
    """
    rows, info = run_sweep(sweep_of(settings), launcher)
    _report(rows, info, settings.out)
    return 0 if all(row.status == "ok" for row in rows) else 1


def sweep_of(settings: CompareSettings) -> Sweep:
    """The comparison as cells to run."""
    return Sweep(
        settings=settings,
        kind="compare",
        plan=lambda: plan_cells(settings),
        describe=lambda cell: _describe(settings, cell),
        fill=fill_row,
        one_line=_one_line,
    )


def fill_row(row: Row, result: CellResult, cell: Cell) -> Row:
    """The row of a cell that ran: of each step the slowest rank's time, of each size the largest rank's."""
    ranks = result.speed
    times = [max(step) for step in zip(*(rank.times_ms for rank in ranks), strict=True)]
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle, middle, middle)
    tokens = cell.train.micro_batch * cell.train.accumulation * cell.train.seq_len * len(ranks)
    return row.model_copy(
        update={
            "val_loss": result.val_loss,
            "unigram_entropy": result.unigram_entropy,
            "train_loss": result.losses,
            "ms_per_step": middle,
            "ms_low": low,
            "ms_high": high,
            "tokens_per_s": tokens / middle * 1e3,
            "state_bytes_per_param": sum(rank.state_bytes for rank in ranks) / result.parameters,
            "model_state_bytes": largest([rank.model_state_bytes for rank in ranks]),
            "peak_bytes": largest([rank.peak_bytes for rank in ranks]),
            "peak_kind": ranks[0].peak_kind,
            "rss_peak_bytes": largest([rank.rss_peak_bytes for rank in ranks]),
            "wire_bytes_per_step": _mean([rank.sent_bytes_per_step for rank in ranks]),
            "extra": {
                **row.extra,
                "timed_steps": len(times),
                "tokens_per_step": tokens,
                "skipped_steps": result.skipped_steps,
                "sent_by_operator": ranks[0].sent_by_operator,
                "sent_by_node": _by_node(ranks, result.nodes),
                "memory_by_owner": [rank.owners for rank in ranks],
            },
        }
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _by_node(ranks: Sequence[RankSpeed], nodes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bytes that each node's interfaces sent in a step, as its first rank read them; of one node, nothing to tell."""
    found: dict[str, dict[str, float]] = {}
    for node, rank in zip(nodes, ranks, strict=False):
        if rank.node_sent_per_step is not None:
            found.setdefault(node, rank.node_sent_per_step)
    return found if len(found) > 1 else {}


def _describe(settings: CompareSettings, cell: Cell) -> RunInfo:
    train = cell.train
    tokens = train.micro_batch * train.accumulation * train.seq_len * settings.ranks
    facts = {
        "Model": settings.preset,
        "Text": train.data,
        "Tokenizer": train.tokenizer,
        "Precision": settings.dtype,
        "Tokens a step": f"{tokens:,} ({settings.ranks} ranks x {train.micro_batch} x {train.accumulation}"
        f" sequences of {train.seq_len})",
        "Steps": f"{settings.steps}, cosine after {train.warmup} of warmup",
        "Buckets": f"{bucket_settings(settings.preset)['reduce_bucket_size']:,} elements",
        "Gradient clipping": f"{train.clip:g}",
        "Seed": str(settings.seed),
    }
    if settings.repeat > 1:
        facts["Repeats"] = f"{settings.repeat} passes over all cells, with seeds from {settings.seed} on"
    return RunInfo(
        title=f"Optimizers under DeepSpeed ZeRO: {settings.preset}, {settings.ranks} ranks, {settings.steps} steps",
        command=reproduce(settings),
        started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=describe_machine(),
        settings=facts,
        notes=[
            "Time per step is the median over the steps after the third, each as its slowest rank took it; the small"
            " figures are the quartiles; of repeats, the median of these medians, the least and the most.",
            "Bytes sent are counted at the collectives of steps 2 and 3, for algorithms that send no more than they"
            " must; peak memory is that of the same two steps.",
        ],
    )


def _report(rows: Sequence[Row], info: RunInfo, out: Path) -> None:
    from rich.console import Console

    report = render_compare(rows, info, out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for line in compare_answers(merge_repeats(rows)):
        console.print(line, markup=False, highlight=False)
    console.print(to_rich(terminal_table(rows), info.title))
    for line in failures(report.table):
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    for name, path in (("results", out / RESULTS), ("report", report.markdown), ("report", report.html)):
        console.print(f"{name}: {path}", markup=False, soft_wrap=True)


def _one_line(row: Row) -> str:
    return f"validation loss {row.val_loss:.3f}, {milliseconds(row.ms_per_step)} a step"
