"""What rank 0 tells while a run goes: a JSONL log, a progress bar, and TensorBoard through DeepSpeed's
monitor.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ds_optim.train.manifest import write_atomic

LOG_NAME = "log.jsonl"


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
            keep_until(out / LOG_NAME, first_step)
            self._file = (out / LOG_NAME).open("a", encoding="utf-8", buffering=1)
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


def keep_until(path: Path, step: int) -> None:
    """Drop what a log says of steps after ``step``: a resumed run writes them again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the half line of a run that was killed
            continue
        if record["step"] <= step:
            lines.append(line + "\n")
    write_atomic(path, "".join(lines) if step else "")
