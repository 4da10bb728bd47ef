"""``ds-optim compare``: the same training run under several optimizers and ZeRO stages, side by side in one report."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ds_optim.errors import UserError
from ds_optim.report.compare import render_compare
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, RunInfo, append_row
from ds_optim.report.table import failures, to_rich
from ds_optim.report.units import milliseconds
from ds_optim.train.compare_cells import Cell, CompareSettings, bucket_settings, plan_cells, reproduce
from ds_optim.train.compare_launch import CellJob, CellLauncher, CellOutcome, ForkserverLauncher
from ds_optim.train.compare_worker import CELL_FILE, FAILURE_FILE, RESULT_FILE

__all__ = ["CompareSettings", "run_compare"]

RESULTS = "results.jsonl"
RUN_FILE = "run.json"


def run_compare(settings: CompareSettings, launcher: CellLauncher | None = None) -> int:
    """Run every cell, then write ``results.jsonl`` and the report into ``settings.out``.

    Returns 0 if every cell ran, 1 if some failed: those are rows that say why. Raises ``UserError`` for a mistake in
    the settings, before the first cell starts.

    Args:
        launcher: how the ranks of a cell start; by default as processes of this machine.
    """
    _check_writable(settings.out)
    # Started before the checks: the parent of all ranks imports what they need meanwhile.
    local = ForkserverLauncher(settings.ranks) if launcher is None else None
    launch = launcher or local
    assert launch is not None
    cells = plan_cells(settings)
    _check_data(cells[0], settings)
    _clear(settings.out)
    info = _describe(settings, cells[0])
    (settings.out / RUN_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if local is not None:
        _say("preparing: DeepSpeed builds its C++ ops at first use, which takes minutes once a machine")
        local.prepare(settings.out / "logs", settings.optimizers)
    rows = []
    for index, cell in enumerate(cells):
        _say(f"[{index + 1}/{len(cells)}] {cell.label}, stage {cell.stage}: ", end="")
        row = run_cell(cell, settings, launch)
        append_row(settings.out / RESULTS, row)
        rows.append(row)
        _say(_one_line(row))
    _report(rows, info, settings.out)
    return 0 if all(row.status == "ok" for row in rows) else 1


def run_cell(cell: Cell, settings: CompareSettings, launch: CellLauncher) -> Row:
    """Run one cell to its end and make its row, failed or not."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    for tokenizer in settings.out.glob("tokenizer-*.json"):
        shutil.copy(tokenizer, cell.folder)
    for name in (RESULT_FILE, *(FAILURE_FILE.format(rank=rank) for rank in range(settings.ranks))):
        (cell.folder / name).unlink(missing_ok=True)
    (cell.folder / CELL_FILE).write_text(cell.train.model_dump_json(indent=2) + "\n", encoding="utf-8")
    outcome = launch(CellJob(folder=cell.folder, ranks=settings.ranks, timeout_s=settings.timeout))
    row = _blank_row(cell, settings, outcome)
    result = cell.folder / RESULT_FILE
    if outcome.reason is None and not result.exists():
        row.reason = "every rank ended, but none left a result"
    if outcome.reason is not None or row.reason is not None:
        return row.model_copy(update={"status": "failed"})
    return fill_row(row, json.loads(result.read_text(encoding="utf-8")), cell)


def fill_row(row: Row, result: dict[str, Any], cell: Cell) -> Row:
    """The row of a cell that ran: of each step the slowest rank's time, of each size the largest rank's."""
    ranks: list[dict[str, Any]] = result["ranks"]
    times = [max(step) for step in zip(*(rank["times_ms"] for rank in ranks), strict=True)]
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle, middle, middle)
    tokens = cell.train.micro_batch * cell.train.accumulation * cell.train.seq_len * len(ranks)
    return row.model_copy(
        update={
            "steps": result["steps"],
            "val_loss": result["val_loss"],
            "unigram_entropy": result["unigram_entropy"],
            "train_loss": result["losses"],
            "ms_per_step": middle,
            "ms_low": low,
            "ms_high": high,
            "tokens_per_s": tokens / middle * 1e3,
            "state_bytes_per_param": sum(rank["state_bytes"] for rank in ranks) / result["parameters"],
            "model_state_bytes": _largest(ranks, "model_state_bytes"),
            "peak_bytes": _largest(ranks, "peak_bytes"),
            "peak_kind": ranks[0]["peak_kind"],
            "rss_peak_bytes": _largest(ranks, "rss_peak_bytes"),
            "wire_bytes_per_step": _mean(ranks, "sent_bytes_per_step"),
            "extra": {
                **row.extra,
                "timed_steps": len(times),
                "skipped_steps": result["skipped_steps"],
                "parameters": result["parameters"],
                "sent_by_operator": ranks[0]["sent_by_operator"],
                "memory_by_owner": [
                    {key: rank[key] for key in ("weights", "gradients", "master", "state", "buckets", "other")}
                    for rank in ranks
                ],
            },
        }
    )


def _blank_row(cell: Cell, settings: CompareSettings, outcome: CellOutcome) -> Row:
    return Row(
        optimizer=cell.optimizer,
        momentum_dtype=cell.momentum_dtype,
        stage=cell.stage,
        ranks=settings.ranks,
        dtype=settings.dtype,
        seed=settings.seed,
        repeat=cell.repeat,
        reason=outcome.reason,
        notes=list(cell.notes),
        extra={"wall_s": round(outcome.wall_s, 2), "optimizer_params": cell.train.resolved_params()},
    )


def _largest(ranks: Sequence[dict[str, Any]], key: str) -> int | None:
    values = [rank[key] for rank in ranks if rank[key] is not None]
    return max(values) if values else None


def _mean(ranks: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [rank[key] for rank in ranks if rank[key] is not None]
    return sum(values) / len(values) if len(values) == len(ranks) else None


def _check_writable(out: Path) -> None:
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to --out {str(out)!r}: {error.strerror}; give a folder that you may write to"
        ) from None


def _check_data(cell: Cell, settings: CompareSettings) -> None:
    """Read the text once, as a run will: a missing, empty or too short one is an error here and not in every cell."""
    from ds_optim.train.batches import BatchShape
    from ds_optim.train.data import load_data
    from ds_optim.train.models import preset_config

    train = cell.train.model_copy(update={"out": settings.out})
    shape = BatchShape(
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        accumulation=train.accumulation,
        rank=0,
        world_size=settings.ranks,
    )
    data = load_data(train, shape)
    preset_config(settings.preset, data.vocab_size, train.seq_len)


def _clear(out: Path) -> None:
    """Take away what an earlier comparison left in ``out``, and nothing else."""
    for name in (RESULTS, "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)


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
        facts["Repeats"] = f"{settings.repeat} (median; the spread is the least and the most)"
    return RunInfo(
        title=f"Optimizers under DeepSpeed ZeRO: {settings.preset}, {settings.ranks} ranks, {settings.steps} steps",
        command=reproduce(settings),
        started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=describe_machine(),
        settings=facts,
        notes=[
            "Time per step is the median over the steps after the third, each as its slowest rank took it; the small"
            " figures are the quartiles.",
            "Bytes sent are counted at the collectives of steps 2 and 3, for algorithms that send no more than they"
            " must; peak memory is that of the same two steps.",
        ],
    )


def _report(rows: Sequence[Row], info: RunInfo, out: Path) -> None:
    from rich.console import Console

    report = render_compare(rows, info, out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(to_rich(report.table, info.title))
    for line in failures(report.table):
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    for name, path in (("results", out / RESULTS), ("report", report.markdown), ("report", report.html)):
        console.print(f"{name}: {path}", markup=False, soft_wrap=True)


def _one_line(row: Row) -> str:
    seconds = f"{row.extra['wall_s']:.1f} s"
    if row.status != "ok":
        return f"failed after {seconds}: {row.reason}"
    return f"validation loss {row.val_loss:.3f}, {milliseconds(row.ms_per_step)} a step ({seconds})"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
