"""What bfloat16 and int8 momentum cost in validation loss: whole runs of each optimizer, dtype and seed.

    python -m benchmarks.momentum_dtypes [--out runs/momentum_dtypes]

Every run is a cell of ``ds-optim compare``. For each optimizer and dtype the table shows the validation loss of each
seed, and how far the mean over the seeds lies from that of float32; ``summary.jsonl`` beside it holds the same as rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ds_optim.errors import UserError
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, read_rows, write_rows
from ds_optim.sweep.compare import CompareSettings, run_compare
from ds_optim.sweep.options import settings_of

DTYPES = ("float32", "bfloat16", "int8")
#: Validation loss that a dtype may cost, as a part of float32's.
ALLOWED = 0.005


def summarize(rows: Sequence[Row], stamp: Mapping[str, Any]) -> list[Row]:
    """One row for each optimizer and dtype: the losses by seed, and the change of their mean against float32's.

    Args:
        stamp: machine and date, which each row keeps.
    """
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            cells.setdefault((row.optimizer, row.momentum_dtype), []).append(row)
    summary = []
    for (optimizer, _), runs in cells.items():
        losses = {run.seed: float(run.val_loss) for run in runs if run.val_loss is not None}
        reference = {run.seed: run.val_loss for run in cells.get((optimizer, "float32"), [])}
        both = [seed for seed in losses if reference.get(seed) is not None]
        average = mean(losses.values())
        change = mean(losses[s] for s in both) / mean(float(reference[s] or 0) for s in both) - 1 if both else None
        spread = stdev(losses.values()) if len(losses) > 1 else None
        extra = {"by_seed": losses, "change": change, "spread": spread, **stamp}
        summary.append(runs[0].model_copy(update={"val_loss": average, "train_loss": [], "extra": extra}))
    return summary


def markdown(summary: Sequence[Row]) -> str:
    """The summary as a table."""
    seeds = list(dict.fromkeys(seed for row in summary for seed in row.extra["by_seed"]))
    titles = ["Optimizer", "Momentum", *(f"seed {seed}" for seed in seeds), "mean", "against float32"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in summary:
        losses = [f"{row.extra['by_seed'][seed]:.4f}" if seed in row.extra["by_seed"] else "–" for seed in seeds]
        change = "–" if row.extra["change"] is None else f"{row.extra['change']:+.2%}"
        cells = [row.optimizer, row.momentum_dtype or "float32", *losses, f"{row.val_loss:.4f}", change]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 0,1,2") from None


def _settings(given: argparse.Namespace, seed: int) -> CompareSettings:
    """The comparison of one seed."""
    flags = {
        "optimizers": given.optimizers,
        "stages": str(given.stage),
        "momentum_dtypes": given.dtypes,
        "ranks": given.ranks,
        "steps": given.steps,
        "eval_batches": given.eval_batches,
        "seed": seed,
        "out": given.out / f"seed{seed}",
    }
    return settings_of(CompareSettings, flags)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="lion,muon,lion_muon")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--seeds", type=_whole_numbers, default=[0, 1, 2], help="comma-separated")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--eval-batches", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/momentum_dtypes"))
    given = parser.parse_args()
    rows: list[Row] = []
    try:
        for settings in [_settings(given, seed) for seed in given.seeds]:
            run_compare(settings)
            rows += read_rows(settings.out / "results.jsonl")
    except UserError as error:
        parser.error(str(error))
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    summary = summarize(rows, {"machine": describe_machine(), "date": date})
    write_rows(given.out / "results.jsonl", rows)
    write_rows(given.out / "summary.jsonl", summary)
    (given.out / "summary.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary))
    whole = len(rows) == sum(row.status == "ok" for row in rows)
    return 0 if whole and all(abs(row.extra["change"] or 0) <= ALLOWED for row in summary) else 1


if __name__ == "__main__":
    raise SystemExit(main())
