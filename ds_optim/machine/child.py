"""What a forked rank does besides its work: its log, its end with its parent, its reason in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

LOG_FILE = "rank{rank}.log"
_REASON_CHARACTERS = 400


def begin(environment: Mapping[str, str], log: Path) -> None:
    """The first call of a forked process: its environment, its end with its parent, and its output into ``log``."""
    os.environ.update(environment)
    _end_with_parent()
    redirect(log)


def leave(status: int) -> NoReturn:
    """The last call: not ``sys.exit``, whose tearing down of gloo after a failure waits for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def redirect(log: Path) -> None:
    """Send this process's output to its log, that of C++ libraries too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def build_ops(environment: Mapping[str, str], log: str, names: Sequence[str]) -> None:
    """Build these C++ ops of DeepSpeed for the CPU where they are not built yet; does nothing on other accelerators."""
    begin(environment, Path(log))
    from deepspeed.accelerator import get_accelerator

    from ds_optim.machine.extensions import clear_left_overs, load_op

    if get_accelerator().device_name() == "cpu":
        clear_left_overs()
        for name in names:
            load_op(name)


def reason_line(error: BaseException) -> str:
    """An exception in one line of bounded length; a user's mistake without its class."""
    from ds_optim.errors import UserError

    text = " ".join(str(error).split())
    line = text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
    return line if len(line) <= _REASON_CHARACTERS else line[: _REASON_CHARACTERS - 1] + "…"


def last_line(log: Path) -> str:
    """The last line that a rank which said no reason left in its log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")


def _end_with_parent() -> None:
    """End this process when the one that had it forked ends: not even a killed ``compare`` leaves ranks behind."""
    # The terminal sends its interrupt to every process; ending ranks in order is the launcher's work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
