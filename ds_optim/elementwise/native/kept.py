"""Compiled libraries on the disk: only one that is whole, and this user's or root's, is loaded.

The digest of its content is part of a library's name: a file that was cut short, which would end the process as its
pages are read, is found before it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ds_optim.machine.cache import is_own, write_whole

logger = logging.getLogger("ds_optim")

_OLD_S = 600.0


def find(folder: Path, name: str, symbols: Iterable[str]) -> ctypes.CDLL | None:
    """The library ``name`` of ``folder`` with all of ``symbols``; those that are damaged are removed, with a line."""
    sweep(folder, f"{name}*.so.*", _OLD_S)
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            problem = _fault(path)
            if problem is None:
                return opened(path, symbols)
        except FileNotFoundError:  # another rank took it away
            continue
        except OSError as error:
            problem = error.strerror or str(error)
        logger.warning("ds_optim: %s is compiled anew: it %s", path, problem)
        with suppress(OSError):
            path.unlink()
    return None


def keep(made: Path, folder: Path) -> Path:
    """Put a library into ``folder``, under the digest of its content. Raises ``OSError``."""
    content = made.read_bytes()
    target = folder / f"{made.stem}-{hashlib.sha256(content).hexdigest()}.so"
    # Every rank may be here at once: each has compiled its own, and the name changes hands in one move.
    write_whole(target, content)
    return target


def opened(path: Path, symbols: Iterable[str]) -> ctypes.CDLL:
    """Load a library. Raises ``OSError`` where it cannot be, or lacks one of ``symbols``."""
    loaded = ctypes.CDLL(str(path))
    missing = [symbol for symbol in symbols if not hasattr(loaded, symbol)]
    if missing:
        raise OSError(f"has no {missing[0]}")
    return loaded


def sweep(folder: Path, pattern: str, age_s: float) -> None:
    """Remove what a process that was killed has left: files and folders of this user, so many seconds old."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            found = left.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < age_s:
                continue
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _fault(path: Path) -> str | None:
    """Why a library must not be loaded. Raises ``OSError``."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            return "is no regular file"
        if not is_own(found):
            return "may be another user's"
        if hashlib.sha256(file.read()).hexdigest() != path.stem.rpartition("-")[2]:
            return "is not as it was written"
    return None
