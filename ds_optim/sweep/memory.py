"""``ds-optim memory``: what optimizers hold at each ZeRO stage, estimated, counted by owner and measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from pydantic import Field, model_validator

from ds_optim.machine.forked import usable_gpus
from ds_optim.machine.kept_results import RESULTS
from ds_optim.report.blocks import to_terminal
from ds_optim.report.machine import describe_machine
from ds_optim.report.memory import memory_answers, merge_repeats, render_memory, with_savings
from ds_optim.report.schema import Row, RunInfo
from ds_optim.report.table import failures
from ds_optim.report.units import size
from ds_optim.sweep.cells import Cell, CompareSettings, bucket_settings, plan_cells, reproduce
from ds_optim.sweep.launch import CellLauncher
from ds_optim.sweep.memory_measure import FIRST_STEADY_STEP
from ds_optim.sweep.memory_rows import fill_row
from ds_optim.sweep.run import Sweep, run_sweep


class MemorySettings(CompareSettings):
    """One sweep: each optimizer and momentum dtype at each stage, ``repeat`` fresh process groups each.

    steady: steps of a run whose peak is taken. snapshot: keep the CUDA allocator's history of each rank.
    """

    steps: int = Field(0, ge=0, description="follows from steady")
    eval_batches: int | None = 1
    repeat: int = Field(3, ge=1)
    steady: int = Field(3, ge=1)
    snapshot: bool = False

    @model_validator(mode="after")
    def _has_what_it_asks_for(self) -> MemorySettings:
        if self.snapshot and not usable_gpus():
            raise ValueError(
                "snapshot is the CUDA allocator's history, and ranks will use no CUDA device: leave it out"
            )
        return self


def plan_memory(settings: MemorySettings) -> list[Cell]:
    """The cells in the order in which they run; the steady steps come third, the one that is counted last."""
    steps = FIRST_STEADY_STEP + settings.steady
    return plan_cells(settings.model_copy(update={"steps": steps}))


def run_memory(settings: MemorySettings, launcher: CellLauncher | None = None) -> int:
    """Run every cell, then write ``results.jsonl``, ``results.csv`` and the report into ``settings.out``.

    Returns 0 if every cell ran, 1 if some failed (out of memory, say): those are rows that say why. Raises
    ``UserError`` for a mistake in the settings, before the first cell starts.

    Args:
        launcher: how the ranks of a cell start; by default as processes of this machine.
    """
    sweep = Sweep(
        settings=settings,
        kind="memory",
        options={"steady": settings.steady, "snapshot": settings.snapshot},
        plan=lambda: plan_memory(settings),
        describe=lambda cell: _describe(settings, cell),
        fill=fill_row,
        one_line=_one_line,
    )
    rows, info = run_sweep(sweep, launcher)
    _report(rows, info, settings)
    return 0 if all(row.status == "ok" for row in rows) else 1


def _one_line(row: Row) -> str:
    return f"peak {size(row.peak_bytes)}, model states {size(row.model_state_bytes)}, first step " + size(
        row.extra["first_step_peak"]
    )


def _describe(settings: MemorySettings, cell: Cell) -> RunInfo:
    train = cell.train
    facts: dict[str, Any] = {
        "Model": settings.preset,
        "Ranks": settings.ranks,
        "Precision": settings.dtype,
        "Tokens a micro-batch and rank": f"{train.micro_batch} x {train.seq_len}",
        "Micro-batches a step": train.accumulation,
        "Steps whose peak is taken": f"{settings.steady}, from the {FIRST_STEADY_STEP}rd",
        "Process groups a cell": settings.repeat,
        "Buckets": f"{bucket_settings(settings.preset)['reduce_bucket_size']:,} elements",
    }
    return RunInfo(
        title=f"Memory under DeepSpeed ZeRO: {settings.preset}, {settings.ranks} ranks",
        command=reproduce(settings, "memory"),
        started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=describe_machine(),
        settings={name: str(fact) for name, fact in facts.items()},
    )


def _report(rows: Sequence[Row], info: RunInfo, settings: MemorySettings) -> None:
    from rich.console import Console

    report = render_memory(rows, info, settings.out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for line in memory_answers(with_savings(merge_repeats(rows))):
        console.print(line, markup=False, highlight=False)
    for table in to_terminal(report.table, info.title, console.width):
        console.print(table)
    for line in failures(report.table):
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    written = (settings.out / RESULTS, settings.out / "results.csv", report.markdown, report.html)
    for path in written:
        console.print(str(path), markup=False, soft_wrap=True)
