"""``ds-optim accept``: every part in a process of its own, ended when its time is up; then one page.

A part that fails, crashes or hangs costs none of the others anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ds_optim.accept.checks import PAGE, AcceptSettings, Check, held, nearest, page_rows, verdict
from ds_optim.accept.parts import MINUTES, PARTS
from ds_optim.accept.worker import CHECKS, SETTINGS
from ds_optim.bench.output import open_folder
from ds_optim.machine.child import last_line
from ds_optim.machine.kept_results import RESULTS, RUN_FILE
from ds_optim.report.machine import describe_machine
from ds_optim.report.render import Report, render
from ds_optim.report.schema import Row, RunInfo, append_row, read_rows
from ds_optim.sweep.run import interruptible

LOG = "log.txt"
_TERMINATE_S = 2.0


def accept(settings: AcceptSettings, parts: Sequence[str], out: Path, *, minutes: float, force: bool) -> int:
    """Run the parts, write ``results.jsonl``, ``report.md`` and ``report.html`` into ``out``; 0 if every check holds.

    Raises ``UserError`` where ``out`` cannot be written to, or has results of before and not ``force``.
    """
    open_folder(out, force=force, rows=RESULTS, held=(RESULTS, RUN_FILE))
    rows: list[Row] = []
    told: dict[str, str] = {}
    begun = time.monotonic()
    with interruptible():
        for number, name in enumerate(parts, 1):
            _say(f"[{number}/{len(parts)}] {name}, {PARTS[name].what}: ", end="")
            of_part, seconds = _run_part(name, settings, out, minutes * 60 * PARTS[name].minutes / MINUTES)
            for row in of_part:
                append_row(out / RESULTS, row)
            rows += of_part
            told[f"Part {name}"] = f"{held(of_part)} ({seconds:.0f} s)"
            _say(f"{held(of_part)} ({seconds:.0f} s)")
            for row in of_part:
                if row.status != "ok":
                    _say(f"    failed: {row.optimizer}: {row.reason}")
    report = write_report(rows, settings, parts, out, {**told, "In all": f"{time.monotonic() - begun:.0f} s"})
    for path in (out / RESULTS, report.markdown, report.html):
        print(path)
    _say(f"{'accepted' if all(row.status == 'ok' for row in rows) else 'NOT accepted'}: {held(rows)}")
    return int(any(row.status != "ok" for row in rows))


def _run_part(name: str, settings: AcceptSettings, out: Path, limit_s: float) -> tuple[list[Row], float]:
    """The rows of a part, and how long it took; at least one row, which says why there are no others."""
    folder = out / "logs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text(settings.model_dump_json() + "\n", encoding="utf-8")
    begun = time.monotonic()
    with (folder / LOG).open("wb") as log:
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(
            [sys.executable, "-m", "ds_optim.accept.worker", name, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(settings),
        )
        problem = None
        try:
            status = process.wait(limit_s)
            if status:
                problem = f"its process ended with status {status}; last line of its log: {last_line(folder / LOG)}"
        except subprocess.TimeoutExpired:
            problem = f"it was ended after {limit_s:.0f} s; --minutes gives it more"
        finally:
            _end(process)
    rows = read_rows(folder / CHECKS) if (folder / CHECKS).exists() else []
    if problem is None and not rows:
        problem = f"it checked nothing; last line of its log: {last_line(folder / LOG)}"
    if problem is not None:
        rows.append(Check(name=f"all of {name}", ok=False, note=problem).row(name))
    return rows, time.monotonic() - begun


def _environment(settings: AcceptSettings) -> dict[str, str]:
    """This process's, with the accelerator that is accepted."""
    return {**os.environ, "DS_ACCELERATOR": settings.device}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what still runs of a part, ranks and all."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)


def write_report(
    rows: Sequence[Row], settings: AcceptSettings, parts: Sequence[str], out: Path, told: Mapping[str, str]
) -> Report:
    device = f"{settings.gpus} GPUs" if settings.gpus else "CPU"
    left_out = [name for name in PARTS if name not in parts]
    quick = " --quick" if settings.quick else ""
    info = RunInfo(
        title=f"Acceptance on {describe_machine()['GPU'] if settings.gpus else describe_machine()['CPU']}",
        command=f"ds-optim accept{quick} --only {','.join(parts)} --out {out.name}",
        started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=describe_machine(),
        settings={
            "Device": device,
            "Ranks": str(settings.ranks),
            "Cells": "a few" if settings.quick else "all",
            **told,
        },
        notes=[f"All checks, one a line: {RESULTS}.", *([f"Left out: {', '.join(left_out)}."] if left_out else [])],
    )
    (out / RUN_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
    plot = nearest(rows)
    return render(page_rows(rows), info, out, PAGE, summary=[verdict(rows)], plots=[] if plot is None else [plot])


def _say(line: str, end: str = "\n") -> None:
    print(line, end=end, file=sys.stderr, flush=True)
