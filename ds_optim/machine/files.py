"""The files of a run's folder: read as input that nobody vouches for, written where no link leads out of it.

What is opened to be read is a regular file of bounded size, never a link, a pipe or a device at which a process waits;
JSON has one reader, which gives a value of a stated type or one line that says why not.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

PARTIAL = ".partial"
TEXT_LIMIT = 4096
"""Bytes of a file that holds one line."""
JSON_LIMIT = 64 << 20
_OLD_S = 60.0
_FULL_BYTES = 1 << 20
M = TypeVar("M", bound=BaseModel)


class Unreadable(Exception):
    """Why a file, or what is in it, cannot be taken: a few words that go on from the file's name."""


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, to be read. Raises ``Unreadable``."""
    return os.fdopen(_open(path, os.O_RDONLY), "rb")


def open_append(path: Path) -> IO[str]:
    """A regular file, made where there is none, to be written on line by line. Raises ``Unreadable``."""
    descriptor = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """All of a regular file of at most ``limit`` bytes. Raises ``Unreadable``."""
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(error) from None
    if len(content) > limit:
        raise Unreadable(f"is larger than {limit:,} bytes")
    return content


def read_line(path: Path) -> str:
    """What a file of one line holds, without spaces around it. Raises ``Unreadable``."""
    try:
        return read_bytes(path, TEXT_LIMIT).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise Unreadable("is damaged (no UTF-8)") from None


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text, nested 200 deep at most. Raises ``Unreadable``."""
    try:
        return from_json(content)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is damaged ({short(error)})") from None


def typed(value: Any, kind: type[M]) -> M:
    """A value that was read, as ``kind`` says that it must be. Raises ``Unreadable``."""
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Unreadable(f"is damaged ({short(': '.join(filter(None, (where, first['msg']))))})") from None
    except RecursionError:
        raise Unreadable("is damaged (nested too deep)") from None


def read_json(path: Path, kind: type[M], limit: int = JSON_LIMIT) -> M:
    """What a JSON file holds. Raises ``Unreadable``."""
    return typed(parse_json(read_bytes(path, limit)), kind)


def short(what: object, limit: int = 160) -> str:
    """A text of one line, cut where it is long: what a file holds may be of any length."""
    try:
        text = str(what)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a {type(what).__name__} that is too long to show"
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def write_atomic(path: Path, text: str) -> None:
    """Put ``text`` in place so that a reader, or a machine that lost power, has the old file or the new one.

    A link of that name is replaced, and what it leads to is left alone. Raises ``OSError``.
    """
    _sweep(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; file systems that cannot say so are taken at their word."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def drop_link(path: Path) -> None:
    """Take a symbolic link away that stands where somebody else is going to write. Raises ``OSError``."""
    if path.is_symlink():
        path.unlink()


def _open(path: Path, how: int) -> int:
    try:
        # A pipe that nobody writes to would hold an ordinary open for ever.
        descriptor = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:  # a name with a NUL in it
        raise _unreadable(error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("is no regular file")
    return descriptor


def _unreadable(error: OSError | ValueError) -> Unreadable:
    if isinstance(error, FileNotFoundError):
        return Unreadable("is missing")
    if not isinstance(error, OSError):
        return Unreadable(f"cannot be read ({short(error)})")
    if error.errno == errno.ELOOP:
        return Unreadable("is a symbolic link")
    if error.errno in (errno.EISDIR, errno.ENXIO):
        return Unreadable("is no regular file")
    return Unreadable(f"cannot be read ({error.strerror})")


def _sweep(path: Path) -> None:
    """What writers that were killed left beside ``path``; one that lives is done in a moment."""
    for left in path.parent.glob(f"{path.name}.*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _OLD_S:
                left.unlink()


def write_reason(error: BaseException, folder: Path) -> str:
    """Why a write failed, in a few words; torch's writer says little of a disk that is full."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return "No space left on device"
    return " ".join(str(error).split())[:160] or type(error).__name__
