"""Cells run one after another, each in a fresh process group; every one becomes a row, failed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ds_optim.errors import UserError
from ds_optim.job.exits import Preempted
from ds_optim.job.presets import tuned_params
from ds_optim.machine.files import write_atomic
from ds_optim.machine.forked import check_ranks
from ds_optim.machine.kept_results import RESULTS, RUN_FILE, holds, refuse
from ds_optim.machine.run_lock import RunLock
from ds_optim.report.merge import read_info
from ds_optim.report.schema import Row, RunInfo, append_row, read_rows, write_rows
from ds_optim.sweep.cells import Cell, CompareSettings
from ds_optim.sweep.launch import CellJob, CellLauncher, CellOutcome, ForkserverLauncher
from ds_optim.sweep.nodes import launcher_from
from ds_optim.sweep.options import HELD
from ds_optim.sweep.result import CellResult
from ds_optim.sweep.worker import CELL_FILE, RESULT_FILE

#: What torch's allocators, Python and the kernel say when there is no memory left.
_OUT_OF_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "memoryerror")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run, and how a cell's result becomes a row.

    Attributes:
        kind: which of the observers of ``ds_optim.sweep.worker`` measures, also the rows' ``kind``.
        options: that observer's, as JSON.
        plan: the cells; raises ``UserError`` for what no run can have.
        describe: the run as a whole, given its first cell.
        fill: the row of a cell that ran, from the blank row and what the ranks left.
        one_line: the row in a few words, for the terminal.
    """

    settings: CompareSettings
    kind: str
    plan: Callable[[], list[Cell]]
    describe: Callable[[Cell], RunInfo]
    fill: Callable[[Row, CellResult, Cell], Row]
    one_line: Callable[[Row], str]
    options: Mapping[str, Any] = field(default_factory=dict)


def run_sweep(sweep: Sweep, launcher: CellLauncher | None = None) -> tuple[list[Row], RunInfo]:
    """Run every cell, each row written to ``results.jsonl`` as soon as it is there.

    Raises ``UserError`` for a mistake in the settings, and for earlier results in the folder unless they are to be kept
    or replaced, before the first cell starts; ``Preempted`` where a signal ends it, the rows so far being kept.

    Args:
        launcher: how the ranks of a cell start; by default as the environment says, else as processes of this machine.
    """
    settings = sweep.settings
    launcher = launcher or launcher_from(os.environ)
    _check_writable(settings.out)
    lock = RunLock()
    lock.take(settings.out, "give another --out, or end that sweep first")
    try:
        with interruptible():
            return _run_sweep(sweep, launcher)
    except KeyboardInterrupt:
        raise Preempted(_interrupted(settings.out)) from None
    finally:
        lock.release()


def _run_sweep(sweep: Sweep, launcher: CellLauncher | None) -> tuple[list[Row], RunInfo]:
    settings = sweep.settings
    if not (settings.resume or settings.force):
        refuse(settings.out, HELD, "add --resume to go on, --force to replace it, or give another --out")
    if launcher is None:
        check_ranks(settings.ranks)
    # Started before the other checks: the parent of all ranks imports what they need meanwhile.
    local = ForkserverLauncher(settings.ranks) if launcher is None else None
    launch = launcher or local
    assert launch is not None
    cells = sweep.plan()
    info = sweep.describe(cells[0])
    rows = _kept(info, settings) if settings.resume else []
    _check_data(cells[0], settings)
    _clear(settings.out)
    write_rows(settings.out / RESULTS, rows)
    write_atomic(settings.out / RUN_FILE, info.model_dump_json(indent=2) + "\n")
    if local is not None:
        _say("preparing: DeepSpeed builds its C++ ops at first use, which takes minutes once a machine")
        local.prepare(settings.out / "logs", settings.optimizers)
    done = {_key(row) for row in rows}
    for index, cell in enumerate(cells):
        if _key(cell) in done:
            continue
        _say(f"[{index + 1}/{len(cells)}] {cell.label}, stage {cell.stage}: ", end="")
        row = run_cell(cell, sweep, launch)
        append_row(settings.out / RESULTS, row)
        rows.append(row)
        seconds = f"{row.extra['wall_s']:.1f} s"
        ended = f"failed after {seconds}: {row.reason}" if row.status != "ok" else f"{sweep.one_line(row)} ({seconds})"
        _say(ended)
    order = [_key(cell) for cell in cells]
    return sorted(rows, key=lambda row: order.index(_key(row))), info


def run_cell(cell: Cell, sweep: Sweep, launch: CellLauncher) -> Row:
    """Run one cell to its end and make its row, failed or not."""
    settings = sweep.settings
    # What a cell left that was interrupted is not its own.
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True, exist_ok=True)
    for tokenizer in settings.out.glob("tokenizer-*.json"):
        shutil.copy(tokenizer, cell.folder)
    told = {"kind": sweep.kind, "options": dict(sweep.options), "train": cell.train.model_dump(mode="json")}
    (cell.folder / CELL_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    outcome = launch(CellJob(folder=cell.folder, ranks=settings.ranks, timeout_s=settings.timeout))
    row = _blank_row(cell, sweep, outcome)
    result = cell.folder / RESULT_FILE
    if outcome.reason is None and not result.exists():
        row.reason = "every rank ended, but none left a result"
    if row.reason is not None:
        row.extra["out_of_memory"] = any(sign in row.reason.lower() for sign in _OUT_OF_MEMORY)
        return row.model_copy(update={"status": "failed"})
    left = CellResult.model_validate_json(result.read_bytes())
    row.extra |= {"nodes": left.nodes, "parameters": left.parameters}
    return sweep.fill(row.model_copy(update={"steps": left.steps}), left, cell)


def _blank_row(cell: Cell, sweep: Sweep, outcome: CellOutcome) -> Row:
    return Row(
        kind=sweep.kind,
        optimizer=cell.optimizer,
        momentum_dtype=cell.momentum_dtype,
        stage=cell.stage,
        ranks=sweep.settings.ranks,
        dtype=sweep.settings.dtype,
        seed=cell.train.seed,
        repeat=cell.repeat,
        reason=outcome.reason,
        notes=list(cell.notes),
        extra={
            "wall_s": round(outcome.wall_s, 2),
            "optimizer_params": cell.train.resolved_params(),
            "tuned": cell.train.tuned and "lr" in tuned_params(cell.train.preset, cell.train.optimizer),
        },
    )


def _key(of: Row | Cell) -> tuple[str, str, int | None, int]:
    return of.optimizer, of.momentum_dtype, of.stage, of.repeat


def _kept(info: RunInfo, settings: CompareSettings) -> list[Row]:
    """The rows in ``out`` that need not be measured again: those of the same sweep that did not fail."""
    out = settings.out
    if holds(out, [RUN_FILE]) is None:
        raise UserError(f"--resume: {out} holds no sweep; start without --resume")
    before = read_info(out).command
    if before != info.command:
        raise UserError(f"--resume: {out} holds another sweep; go on with {before}, or give another --out")
    rows = read_rows(out / RESULTS) if holds(out, [RESULTS]) else []
    kept = [row for row in rows if row.status == "ok"]
    failed = len(rows) - len(kept)
    _say(f"kept: {len(kept)} cells of {out}" + (f"; {failed} that failed run again" if failed else ""))
    return kept


def _interrupted(out: Path) -> str:
    rows = read_rows(out / RESULTS) if holds(out, [RESULTS]) else []
    return f"interrupted: {len(rows)} cells are kept in {out / RESULTS}; the same command with --resume goes on"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is under way in order, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_writable(out: Path) -> None:
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        write_atomic(probe, "")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to --out {str(out)!r}: {error.strerror}; give a folder that you may write to"
        ) from None


def _check_data(cell: Cell, settings: CompareSettings) -> None:
    """Read the text once, as a run will: a missing, empty or too short one is an error here and not in every cell."""
    from ds_optim.data.batches import BatchShape
    from ds_optim.data.load import load_data
    from ds_optim.job.models import preset_config

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
    """Take away what an earlier sweep left in ``out``, and nothing else."""
    for name in (RESULTS, "results.csv", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
