"""Signals and a file that ask the run to end: noted when they come, obeyed by all ranks at the next step border.

The first one lets the run save and end with status 75. Before the ranks have met nothing is lost, and the process ends
at once; a second SIGINT or SIGTERM ends it at once too. Launchers pass on what the terminal sent as well: the same
signal within a second is one request, and SIGUSR1 never ends a run that saves, so that it can be repeated until it is
heard. A SIGTERM before the ranks have met is the launcher's where it has lost another rank: status 69.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from ds_optim.job import exits as ends
from ds_optim.machine import siblings
from ds_optim.machine.held import SIGNALS, release
from ds_optim.machine.said import keep_stderr, last_words

STOP_NAME = "stop"
"""A file of this name in a run's folder is a request too."""
_INSIST = ("SIGTERM", "SIGINT", "SIGHUP")
_SAME_S = 1.0
_LOOK_S = 0.5


class Preemption:
    """Within the ``with`` block a signal or the file sets ``asked``, and says so; once ``over``, they do nothing.

    ``by_file``: it was the file, which whoever put it there wants to be the end.

    A handler that was installed outside of Python (a stack dumper's) stays, a signal that is ignored stays ignored, and
    outside of the main thread, where Python allows no handlers, none is caught.

    Args:
        out: the run's folder, where a start that ends before the ranks have met leaves how it ended.
        last: the process ends after the block: a signal that comes once the run is over must not change its status.
    """

    def __init__(self, out: Path | None = None, *, last: bool = False) -> None:
        self._out = out
        self._last = last
        self.asked = 0.0
        self.by_file = False
        self.over = False
        self._joined = False
        self._file: Path | None = None
        self._looked = 0.0
        self._first: dict[int, float] = {}
        self._before: dict[Any, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            return self
        keep_stderr()
        # The main thread may be held where no Python runs (a rendezvous): a thread of its own hears the signals.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(self._pipe[0],), daemon=True, name="ds_optim signals").start()
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        # Launch scripts block them while a rank starts, so that none comes before it can be handled.
        release()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last and self.over else handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # the thread reads its end, and closes the other one

    def joined(self, out: Path | None, *, first: bool) -> None:
        """The ranks have met: from here on they end together. On the ``first`` rank the file in ``out`` counts too;
        one that an earlier run left is taken away."""
        self._joined = True
        if first and out is not None:
            self._file = out / STOP_NAME
            self.forget_file()

    def wanted(self) -> float:
        """1.0 where this rank was asked to end, else 0.0; looks for the file every now and then."""
        if self._file is not None and not self.asked and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            if self._file.exists():
                self._say(f"{self._file} is there: saving after this step, then ending with status {ends.PREEMPTED}")
                self.asked, self.by_file = 1.0, True
        return self.asked

    def forget_file(self) -> None:
        """Take the file away: it was obeyed, or is of an earlier run."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.over:
            self.asked = 1.0

    def _hear(self, pipe: int) -> None:
        while heard := os.read(pipe, 1):
            if heard[0] in self._before and not self.over:
                self._obey(heard[0])
        os.close(pipe)

    def _obey(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._joined:
            self._end(*self._unbegun(number))
        if not self._first:
            more = "; the same again ends at once" if name in _INSIST else ""
            self._say(f"{name}: saving after this step, then ending with status {ends.PREEMPTED}{more}")
        if name in _INSIST and now - self._first.setdefault(number, now) > _SAME_S:
            self._end(f"{name} again: ended at once; earlier checkpoints are as they were", 128 + number)
        self._first.setdefault(number, now)

    def _unbegun(self, number: int) -> tuple[str, int]:
        """The line and status of a start that ends before the ranks have met; noted, unless another rank has."""
        noted = ends.read_end(self._out, psutil.Process().create_time())
        gone = siblings.gone(os.environ) if number == signal.SIGTERM else []
        if gone and (noted is None or noted.status != ends.PREEMPTED):
            which = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
            line, status = f"{which} ended before the ranks had joined, and the launcher ended this one", ends.RANK_LOST
        else:
            name, status = signal.Signals(number).name, ends.PREEMPTED
            line = f"{name} before the ranks had joined: nothing was begun"
        if noted is None:
            with suppress(OSError):
                ends.note_unbegun(self._out, status, line)
        return f"error: {line}" if status == ends.RANK_LOST else line, status

    def _say(self, line: str) -> None:
        print(f"ds-optim: {line}", file=sys.stderr, flush=True)

    def _end(self, line: str, status: int) -> NoReturn:
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
        last_words(f"{shown}ds-optim: {line}")
        sys.stdout.flush()
        os._exit(status)
