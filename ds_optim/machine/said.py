"""Lines that a process ends with: one of all ranks of a node prints a line that all have, and last words are heard."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
#: How long another rank's line counts as this one's: a run that is started again must not be silent.
_SECONDS = 60.0
_PREFIX = "ds-optim-said-"


def is_first_to_say(line: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to print ``line``: no other rank that its launcher started on this node has just done so.

    Ranks of a node know each other by their parent. Where anything about that fails, the line is printed.
    """
    rank = next((environment[name] for name in _RANK if name in environment), None)
    if rank is None:
        return True
    try:
        return _leave_mark(_mark(line), rank)
    except Exception:  # whatever it is, the user's line comes first
        return True


def _mark(line: str) -> Path:
    import psutil

    parent = psutil.Process(os.getppid())
    key = hashlib.sha256(f"{parent.pid} {parent.create_time()} {line}".encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{key[:24]}"


def _leave_mark(path: Path, rank: str) -> bool:
    for other in path.parent.glob(f"{_PREFIX}*"):
        if other.stat().st_mtime < time.time() - _SECONDS:
            other.unlink(missing_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(rank)
        return True
    except FileExistsError:
        return path.read_text(encoding="utf-8") == rank


_stderr = 2


def keep_stderr() -> None:
    """Last words go to what is stderr now: DeepSpeed points it elsewhere while it asks a compiler what it can."""
    global _stderr
    with suppress(OSError):
        before, _stderr = _stderr, os.dup(2)
        if before != 2:
            os.close(before)


def last_words(text: str) -> None:
    """Write ``text`` for the user before the process ends at once, past ``sys.stderr``, which others may hold."""
    with suppress(OSError):
        os.write(_stderr, f"{text}\n".encode(errors="replace"))
