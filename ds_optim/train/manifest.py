"""What makes a folder a complete checkpoint: ``manifest.json``, with the size and CRC-32 of each of its files.

The manifest is written last, by an atomic rename, after every file it names is on the disk; it is the first thing to
go when a checkpoint is deleted. So a folder with a manifest was complete once, and the sizes and checksums tell whether
it still is. CRC-32 finds torn writes and flipped bits at memory speed; it is no proof against who means harm.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "manifest.json"
FORMAT = 1
_DELETING = "manifest.deleting"
_PARTIAL = ".partial"
_CHUNK = 1 << 22


class ManifestError(Exception):
    """Why a manifest, or a name in it, cannot be trusted; one line."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a checkpoint: ``size`` in bytes and ``crc32``."""

    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``files`` by their POSIX path within the folder; ``notes`` are the writer's own, as JSON."""

    notes: dict[str, Any]
    files: dict[str, Entry]


def list_files(folder: Path) -> list[str]:
    """The POSIX paths of all files under ``folder``, sorted, its manifest left out.

    Raises ``ManifestError`` for what is neither a file nor a folder.
    """
    names = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ManifestError(f"{path.name} is no regular file")
        if path.is_file() and path != folder / NAME and not path.name.endswith(_PARTIAL):
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def measure(path: Path, *, sync: bool = False) -> Entry:
    """Size and checksum of a file; with ``sync`` it is on the disk when this returns. Raises ``OSError``."""
    size, crc = 0, 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return Entry(size=size, crc32=crc)


def fault(folder: Path, name: str, entry: Entry) -> str | None:
    """What is wrong with a file of a checkpoint, in one line that names it; None if it is as it was sealed."""
    try:
        path = inside(folder, name)
        if not path.exists():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size} bytes of {entry.size}" if size < entry.size else f"{name} has grown"
        return None if measure(path) == entry else f"{name} has other bits than were written (CRC-32)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ManifestError as error:
        return str(error)


def inside(folder: Path, name: str) -> Path:
    """The path of ``name`` within ``folder``; raises ``ManifestError`` where it would leave it.

    A name is relative, without ``..``, and no part of it is a symbolic link.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or ":" in name or "\0" in name or name.startswith("/") or ".." in parts:
        raise ManifestError(f"the manifest names {name!r}, which is no path within the checkpoint")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(f"{name} is a symbolic link")
    if path.exists() and not path.is_file():
        raise ManifestError(f"{name} is no regular file")
    return path


def seal(folder: Path, notes: Mapping[str, Any], files: Mapping[str, Entry]) -> None:
    """Write the manifest of a folder whose files are on the disk. One process; raises ``OSError``."""
    for path in {folder, *(folder / name for name in files)}:
        _sync_folder(path if path.is_dir() else path.parent)
    body = {
        "format": FORMAT,
        "notes": dict(notes),
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    write_atomic(folder / NAME, json.dumps({**body, "crc32": _crc(body)}, indent=1) + "\n")
    _sync_folder(folder.parent)


def seal_folder(folder: Path, notes: Mapping[str, Any]) -> None:
    """Seal whatever files are in ``folder``: for tools of one process. Raises ``OSError`` and ``ManifestError``."""
    seal(folder, notes, {name: measure(folder / name, sync=True) for name in list_files(folder)})


def read(folder: Path) -> Manifest:
    """The manifest of a folder; raises ``ManifestError`` where it is not as it was written, or names outer paths."""
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
        body = {key: record[key] for key in ("format", "notes", "files")}
        if record["crc32"] != _crc(body):
            raise ManifestError(f"{NAME} has other bits than were written (CRC-32)")
        if body["format"] != FORMAT:
            raise ManifestError(f"{NAME} is of format {body['format']!r}, this version reads {FORMAT}")
        files = {name: Entry(**entry) for name, entry in body["files"].items()}
        notes = dict(body["notes"])
    except OSError as error:
        raise ManifestError(f"{NAME} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ManifestError(f"{NAME} is damaged") from None
    for name in files:
        inside(folder, name)
    return Manifest(notes=notes, files=files)


def remove(folder: Path, seals: Iterable[str] = (NAME,)) -> None:
    """Delete a checkpoint, its ``seals`` first: one that is half deleted never counts. Raises ``OSError``."""
    for name in seals:
        if (folder / name).exists():
            (folder / name).replace(folder / _DELETING)
            _sync_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)


def write_atomic(path: Path, text: str) -> None:
    """Put ``text`` in place so that a reader, or a machine that lost power, has the old file or the new one."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; file systems that cannot say so are taken at their word."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
