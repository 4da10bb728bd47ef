"""Run the study, go on with it, or report it.

    python -m benchmarks.convergence [--study FILE] [--quick] [--compile] [--out FOLDER] [--workers N] [--hours H]
    python -m benchmarks.convergence --dry-run          # cells and tokens by block
    python -m benchmarks.convergence --commands         # the cells as commands of ds-optim train
    python -m benchmarks.convergence --report           # report.md from what is done
    python -m benchmarks.convergence --page             # the tables of docs/evidence.md from committed rows

Killed at any time, it goes on where it was. Rows in ``benchmarks/results/convergence/`` count as done.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.loop import run_cell
from benchmarks.convergence.study import Cell, Study, load_study, losses
from benchmarks.convergence.text import load_text
from ds_optim.errors import UserError
from ds_optim.machine.files import write_atomic
from ds_optim.machine.run_lock import RunLock
from ds_optim.report.machine import describe_machine

HERE = Path(__file__).parent
COMMITTED = HERE.parent / "results" / "convergence"
Results = dict[str, dict[str, Any]]


def read_results(out: Path, committed: Path = COMMITTED) -> Results:
    """What is done, by key: committed rows, and those of this folder."""
    lines = [line for path in sorted(committed.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    lines += [path.read_text("utf-8") for path in sorted((out / "cells").glob("*.json"))]
    return {row["key"]: row for row in map(json.loads, lines)}


def run_study(
    study: Study, out: Path, workers: int, *, commit: str, hours: float | None = None, compiled: bool = False
) -> Results:
    """Run what is due, the first in the committed order first, until nothing is or the hours are over."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lock = RunLock()
    lock.take(out)
    results = read_results(out)
    ends = None if hours is None else time.monotonic() + hours * 3600
    stamp = {"commit": commit, "machine": describe_machine(), "compiled": compiled}
    running: dict[Future[dict[str, Any]], str] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while True:
            if ends is None or time.monotonic() < ends:
                waiting = [c for c in study.due(losses(results)) if c.key not in running.values() and _local(study, c)]
                for cell in waiting[: workers - len(running)]:
                    running[pool.submit(_work, study, cell, out, stamp)] = cell.key
            if not running:
                return results
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(done)
                results[key] = row = done.result()
                said = row["cell"]
                loss = "diverged" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
                print(f"{said['model']} x{said['horizon']:g} {said['entry']} {said['params']} seed {said['seed']}: "
                      f"{loss}, {row['seconds']:.0f} s", flush=True)  # fmt: skip


def _local(study: Study, cell: Cell) -> bool:
    return not study.data[cell.data].startswith("hub:")


def _work(study: Study, cell: Cell, out: Path, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """A cell in a process of its own, on a GPU of its own where there are any; its row is in place at the end."""
    torch.set_num_threads(1)
    count = torch.cuda.device_count()
    device = torch.device("cuda", os.getpid() % count) if count else torch.device("cpu")
    model = study.models[cell.model]
    text = load_text(study.data[cell.data], model.tokenizer, out / "text")
    checkpoint = out / "cells" / f"{cell.key}.pt"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    measured = run_cell(study, cell, text, device, checkpoint, stamp["compiled"])
    row = {**measured, "date": date, "device": str(device.type), **stamp}
    write_atomic(out / "cells" / f"{cell.key}.json", json.dumps(row) + "\n")
    checkpoint.unlink(missing_ok=True)
    return row


def collect(results: Results, path: Path) -> None:
    """All rows in one file, in an order that does not change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(results[key]) + "\n" for key in sorted(results)))


def command(study: Study, cell: Cell) -> str:
    """The cell as a run of ``ds-optim train``, for GPUs and streamed text."""
    model = study.models[cell.model]
    if model.preset is None:
        raise UserError(f"model {cell.model!r} is no preset of ds-optim train; its cells run here")
    params = dict(cell.params)
    steps = study.steps(cell)
    flags = {
        "preset": model.preset, "data": study.data[cell.data], "tokenizer": model.tokenizer, "seq-len": model.seq_len,
        "micro-batch": 8, "accumulation": max(1, model.batch // 8), "steps": steps, "warmup": int(steps * study.warmup),
        "optimizer": cell.optimizer, "lr": params.pop("lr"), "optimizer-params": json.dumps(params), "clip": study.clip,
        "seed": cell.seed, "eval-every": max(1, steps // study.evals), "out": f"runs/convergence/{cell.key}",
    }  # fmt: skip
    return "ds-optim train " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())


def plan_text(study: Study, results: Results) -> str:
    """By block: cells known now, those done, and tokens still to train on."""
    lines, done = [], losses(results)
    for block in study.blocks:
        known = list(study.wanted(block, done))
        left = [cell for cell in known if cell.key not in done]
        tokens = sum(study.steps(c) * study.models[c.model].batch * study.models[c.model].seq_len for c in left)
        more = "" if left else ", all done so far" if known else " (follows from rates that are not known yet)"
        lines.append(f"{block.name}: {len(left)} cells due, {tokens / 1e6:.0f}M tokens{more}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--quick", action="store_true", help="the study of a quarter of an hour: quick.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count() or (os.cpu_count() or 1)))
    parser.add_argument("--hours", type=float, help="start no cell after so many")
    parser.add_argument("--commit", default="", help="what the rows say they were made with")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a quarter less time on a CPU")
    for flag in ("--dry-run", "--commands", "--report", "--page"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    try:
        study = load_study(HERE / "quick.yaml" if given.quick else given.study)
        results = read_results(given.out)
        if given.dry_run:
            print(plan_text(study, results))
        elif given.page:
            from benchmarks.convergence import page

            text = page.filled(page.PAGE.read_text("utf-8"), study, read_results(HERE / "nowhere"))
            write_atomic(page.PAGE, text)
        elif given.commands:
            due = [cell for cell in study.due(losses(results)) if study.models[cell.model].preset is not None]
            print("\n".join(command(study, cell) for cell in due))
        else:
            if not given.report:
                results = run_study(
                    study, given.out, given.workers, commit=given.commit, hours=given.hours, compiled=given.compile
                )
            collect(results, given.out / "results.jsonl")
            from benchmarks.convergence.report import write_report

            print(write_report(study, results, given.out))
    except UserError as error:
        parser.error(str(error))
    return 0
