"""Whether this process computes or reads, seen without its help: a step that takes long is no hang."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

_CPU_SHARE = 0.05
_BYTES = 1 << 16


class Activity:
    """CPU time of all threads, and bytes read and written by system calls, between two looks."""

    def __init__(self) -> None:
        self._last = (time.monotonic(), time.process_time(), _moved_bytes())

    def since_last(self) -> bool:
        """Whether there was more than watching takes since the last call."""
        then, self._last = self._last, (time.monotonic(), time.process_time(), _moved_bytes())
        seconds, cpu, moved = (now - before for now, before in zip(self._last, then, strict=True))
        return cpu > _CPU_SHARE * seconds or moved > _BYTES


def _moved_bytes() -> int:
    """0 where the kernel does not count."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return 0
