"""The shared memory of DeepSpeed's collectives on a CPU: 69 MB a rank in /dev/shm, which nobody else unlinks.

A segment is ``deepspeed_allreduce_buffer_UID_ADDRESS_PORT_RANK``. When all ranks have mapped it, its name is needed no
more: taken away then, the memory goes with the last process that has it, however that ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PREFIX = "deepspeed_allreduce_buffer"
FOLDER = Path("/dev/shm")
_YOUNG_S = 30.0
"""Ranks that start map their segments long before they are so old."""


def segment(environment: Mapping[str, str]) -> str:
    """The name of this rank's segment."""
    names = (environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return "_".join((PREFIX, str(os.getuid()), *names))


def unlink_own(environment: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Take this rank's segment off the list of names; all ranks have mapped it."""
    with suppress(OSError):
        (folder / segment(environment)).unlink()


def sweep(folder: Path = FOLDER) -> int:
    """Unlink this user's segments that no process maps, left by ranks that were killed as they started; how many."""
    removed = 0
    found = [path for path in folder.glob(f"{PREFIX}_{os.getuid()}_*") if _is_old_and_ours(path)]
    used = _mapped(folder) if found else set()
    for path in found:
        with suppress(OSError):
            if path.name not in used:
                path.unlink()
                removed += 1
    return removed


def _is_old_and_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S


def _mapped(folder: Path) -> set[str]:
    """The names of segments that processes of this machine have mapped."""
    names = set()
    start = f"{folder}/{PREFIX}"
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
                _, found, name = line.partition(start)
                if found:
                    names.add(PREFIX + name.removesuffix(" (deleted)"))
    return names
