"""A command on a terminal of its own for ``ds-optim chaos``: told to end at some time, and what became of it."""

from __future__ import annotations

import fcntl
import os
import pty
import secrets
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

Signalled = Literal["SIGTERM", "SIGUSR1", "SIGHUP", "Ctrl-C"]

_VARIABLE = "DS_OPTIM_CHAOS"
_ATTEMPT_S = 300.0
_BOUND_S = 60.0
_SETTLE_S = 5.0


@dataclass
class Done:
    """What was seen of a command: its ``status`` (negative: the signal that it died of), and all that it printed.

    ``told_s``: when it was told to end, in seconds after its start; None where it had ended before. ``end_s`` is how
    long it took from there, ``told_lines`` how many its log had then. ``first_step_s``: when its log got its first
    line. ``left``: process ids that outlived it.
    """

    status: int = 0
    text: str = ""
    hung: bool = False
    told_s: float | None = None
    told_lines: int = 0
    end_s: float = 0.0
    first_step_s: float = _ATTEMPT_S
    left: list[int] = field(default_factory=list)

    def is_dead_of(self, told: Signalled) -> bool:
        """Whether it died of the signal itself, as before it could hear it."""
        return self.status == -getattr(signal, "SIGINT" if told == "Ctrl-C" else told)


class Command:
    """A command under way, told to end ``after_s`` its start, or where ``trained``, after its next line in ``log``."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        log: Path,
        told: Signalled | None,
        after_s: float,
        *,
        trained: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(8)
        self._terminal, inner = pty.openpty()
        self._log, self._told, self._after_s, self._trained = log, told, after_s, trained
        self._size = log.stat().st_size if log.exists() else 0
        self._done = Done()
        self._text = b""
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**_environment(), _VARIABLE: self._token},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(inner)

    def poll(self) -> Done | None:
        """What became of it, once it ended; None before."""
        self._read()
        done, now = self._done, time.monotonic() - self._begin
        if done.first_step_s == _ATTEMPT_S and self._log.exists() and self._log.stat().st_size > self._size:
            done.first_step_s = now
        begun = done.first_step_s if self._trained else 0.0
        status = self._process.poll()
        if status is None and self._told is not None and done.told_s is None and now >= begun + self._after_s:
            done.told_s, done.told_lines = now, line_count(self._log)
            self._tell()
        late = now > _ATTEMPT_S if done.told_s is None else now > done.told_s + _BOUND_S
        if status is None and not late:
            return None
        if done.told_s is not None:
            done.end_s = now - done.told_s
        done.hung = status is None
        done.left = self._left()
        self.end()
        done.status = self._process.wait()
        done.text = self._text.decode("utf-8", "replace")
        return done

    def end(self) -> None:
        """Leave no process behind."""
        if self._terminal < 0:
            return
        if self._process.poll() is None:
            self._process.kill()
        for process in self._alive():
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._read()
        os.close(self._terminal)
        self._terminal = -1

    def _tell(self) -> None:
        if self._told == "Ctrl-C":
            os.write(self._terminal, b"\x03")
        elif self._told is not None:
            self._process.send_signal(getattr(signal, self._told))

    def _read(self) -> None:
        with suppress(OSError):
            while select.select([self._terminal], [], [], 0)[0]:
                chunk = os.read(self._terminal, 1 << 16)
                if not chunk:
                    return
                self._text += chunk

    def _left(self) -> list[int]:
        """Ranks, and what started them, that are there in a moment still."""
        deadline = time.monotonic() + _SETTLE_S
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [process.pid for process in alive]

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_VARIABLE) == self._token:
                    found.append(process)
        return [process for process in found if process.pid != self._process.pid]


def line_count(path: Path) -> int:
    """Lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _environment() -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, **own, "PATH": path}


def _own_terminal() -> None:
    # Whoever started chaos in the background ignores some, which what is started here would do too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
