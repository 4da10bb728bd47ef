"""Where this package keeps what it has made or measured on a machine."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("ds_optim")

_TABLE_BYTES = 1 << 24
#: Who may stand above a folder of ours: root, and whoever a container cannot name, such as the root outside of it.
_ROOT, _UNNAMED = 0, 65534


def cache_folder() -> Path:
    """``$DS_OPTIM_CACHE``, else ``ds_optim`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet.

    For a user without a home, a folder of the user's own among the temporary files; where somebody else has made one
    of that name, or can write to it, one for this process alone, and a line says so.
    """
    own = os.environ.get("DS_OPTIM_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "ds_optim"
    except RuntimeError:
        return _among_temporary_files(tempfile.gettempdir())


def private_folder(name: str) -> Path:
    """The folder ``name`` in the cache, for code that is to be loaded: made where it is missing, for this user alone.

    Raises:
        OSError: it cannot be made, or others can write to it or replace it; ``strerror`` says which.
    """
    root = cache_folder().absolute()
    folder = root / name
    make_folder(folder)
    within = [part for part in (folder, *folder.parents) if root in part.parents]
    for part in within:
        found = part.stat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            part.chmod(0o700)
    problem = _distrust(folder, root)
    if problem is not None:
        raise PermissionError(errno.EPERM, problem)
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone. Raises ``OSError``."""
    for part in reversed((folder, *folder.parents)):
        part.mkdir(mode=0o700, exist_ok=True)


def is_own(found: os.stat_result) -> bool:
    """Whether nobody but this user, or root, can have written what was found."""
    return found.st_uid in (os.geteuid(), _ROOT) and not found.st_mode & 0o022


def read_table(path: Path, version: int) -> dict[str, Any]:
    """A table of measurements, {"version": ..., "devices": {NAME: {...}}}.

    Raises:
        OSError: there is none. ValueError: it is none of this version.
    """
    # A pipe that nobody writes to would hold an ordinary open for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(_TABLE_BYTES + 1)
    if len(content) > _TABLE_BYTES:
        raise ValueError(f"it is larger than {_TABLE_BYTES:,} bytes")
    try:
        table = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(table, dict) or table.get("version") != version or not isinstance(table.get("devices"), dict):
        raise ValueError(f"it is no table of version {version}")
    return table


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table in one move, as ``write_whole``. OSError where it cannot be written."""
    make_folder(path.parent)
    write_whole(path, json.dumps(table, indent=1, allow_nan=False).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place so that a reader, or a machine that lost power, has the old one or the new one.

    It is for this user alone, as its folder is. Raises ``OSError``.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _distrust(folder: Path, root: Path) -> str | None:
    """Why what lies in ``folder`` may be another user's; None where it cannot. From ``root`` on it must be our own."""
    real = Path(os.path.realpath(folder))
    for path in dict.fromkeys((folder, *folder.parents, real, *real.parents)):
        found = path.lstat()
        ours = path in (root, real) or root in path.parents
        if found.st_uid not in (os.geteuid(), _ROOT) and (ours or found.st_uid != _UNNAMED):
            return f"{path} belongs to another user"
        if stat.S_ISLNK(found.st_mode):
            continue
        # In a folder such as /tmp everybody makes files, and nobody takes another's away.
        if found.st_mode & 0o022 if ours else found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX:
            return f"others can write to {path} (chmod go-w takes that away)"
    return None


@cache
def _among_temporary_files(place: str) -> Path:
    folder = Path(place) / f"ds_optim-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        problem = _distrust(folder, folder)
    except OSError as error:
        problem = f"{folder}: {error.strerror}"
    if problem is None:
        return folder
    own, made_by = tempfile.mkdtemp(prefix="ds_optim-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(own, ignore_errors=True) if os.getpid() == made_by else None)
    logger.warning("ds_optim: nothing is kept for later runs: %s; set DS_OPTIM_CACHE to a folder of your own", problem)
    return Path(own)
