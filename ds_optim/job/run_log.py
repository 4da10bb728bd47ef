"""What rank 0 tells while a run goes: a JSONL log, a progress bar, and TensorBoard through DeepSpeed's
monitor.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ds_optim.machine.files import Unreadable, open_append, open_regular, parse_json, typed, write_atomic

LOG_NAME = "log.jsonl"
_LINE_BYTES = 1 << 20


class RunLog:
    """Writes of one run. On ranks other than 0 every method does nothing.

    A line of the log is a step (``step``, ``loss``, ``lr``, ``grad_norm``, ``ms``, ``tokens_per_s``,
    ``skipped``), a validation (``step``, ``val_loss``, ``unigram_entropy``, ``entropy_ratio``) or a ``warning``.
    """

    def __init__(self, out: Path | None, steps: int, *, active: bool, first_step: int = 0) -> None:
        self._active = active
        self._file: IO[str] | None = None
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._told = False
        if not active:
            return
        if out is not None:
            self._open(out / LOG_NAME, first_step)
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[progress.description]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=steps, completed=first_step, state="")
            self._progress.start()
        self._every = max(1, steps // 10)

    def _open(self, path: Path, first_step: int) -> None:
        """Go on with the log of before; it is advice, and no run stops for it."""
        try:
            dropped = keep_until(path, first_step)
            self._file = open_append(path)
        except OSError as error:
            dropped = f"{LOG_NAME} is not written: {error.strerror}"
        except Unreadable as reason:
            dropped = f"{LOG_NAME} is not written: it {reason}"
        if dropped is not None:
            self.say(f"ds-optim: warning: {dropped}")

    def say(self, line: str) -> None:
        """A line for the user."""
        if self._active:
            self._console.print(line, markup=False, soft_wrap=True)

    def warn(self, step: int, line: str) -> None:
        """A line that must not be missed: on stderr, and in the log as ``step`` and ``warning``."""
        self.say(f"ds-optim: warning: {line}")
        self._write({"step": step, "warning": line})

    def step(self, record: dict[str, Any]) -> None:
        """One training step."""
        self._write(record)
        if not self._active:
            return
        state = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], state=state)
        elif record["step"] % self._every == 0:
            self.say(f"step {record['step']}  {state}")

    def validation(self, record: dict[str, Any], engine: Any) -> None:
        """One validation; DeepSpeed's monitor has the training loss and the learning rate by itself."""
        self._write(record)
        if not self._active:
            return
        if getattr(engine.monitor, "enabled", False):
            samples = engine.global_samples
            engine.monitor.write_events(
                [
                    ("Validation/loss", record["val_loss"], samples),
                    ("Validation/entropy_ratio", record["entropy_ratio"], samples),
                ]
            )
        self.say(
            f"step {record['step']}  validation loss {record['val_loss']:.4f}"
            f" = {record['entropy_ratio']:.3f} of the unigram entropy {record['unigram_entropy']:.4f}"
        )

    def close(self) -> None:
        """End the bar and the file."""
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            # JSON has no NaN and no infinity: a loss that is neither is null.
            clean = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }
            try:
                self._file.write(json.dumps(clean) + "\n")
            except OSError as error:  # a full disk is no reason to lose the run
                if not self._told:
                    self._told = True
                    self.say(f"ds-optim: warning: {LOG_NAME} is not written: {error.strerror}")


class _Line(BaseModel):
    """What every line of a log has."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0, lt=2**53)


def keep_until(path: Path, step: int) -> str | None:
    """Drop what a log says of steps after ``step``, which a resumed run writes again, and lines that say nothing.

    One line on what could not be read, or None. Raises ``OSError`` where the log cannot be written anew.
    """
    kept: list[str] = []
    lost, problem = 0, None
    if step and os.path.lexists(path):
        try:
            with open_regular(path) as file:
                # Of a line that is longer than any, the pieces are no lines either.
                while line := file.readline(_LINE_BYTES):
                    read = _step_of(line)
                    if read is None:
                        # The half line at the end is that of a run that was killed.
                        lost += line.endswith(b"\n") or len(line) == _LINE_BYTES
                    elif read <= step:
                        kept.append(line.decode("utf-8"))
        except Unreadable as reason:
            problem = f"{LOG_NAME} {reason}: it is written anew"
        except OSError as error:
            problem = f"{LOG_NAME} cannot be read to its end ({error.strerror}): the rest is dropped"
    write_atomic(path, "".join(kept))
    if lost and problem is None:
        problem = f"{LOG_NAME} has {lost} line{'s' if lost > 1 else ''} that cannot be read: dropped"
    return problem


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return typed(parse_json(line), _Line).step
    except Unreadable:
        return None
