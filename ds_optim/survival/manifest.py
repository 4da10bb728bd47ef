"""What makes a folder a complete checkpoint: ``manifest.json``, with the size and CRC-32 of each of its files.

The manifest is written last, by an atomic rename, after every file it names is on the disk; it is the first thing to
go when a checkpoint is deleted. So a folder with a manifest was complete once, and the sizes and checksums tell whether
it still is. CRC-32 finds torn writes and flipped bits at memory speed; it is no proof against who means harm.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ds_optim.machine.files import (
    PARTIAL,
    Unreadable,
    open_regular,
    parse_json,
    read_bytes,
    short,
    sync_folder,
    typed,
    write_atomic,
)

NAME = "manifest.json"
FORMAT = 2
UNBOUND = 1
"""The format of before the files said, within, of which save they are (``ds_optim.survival.identity``)."""
_DELETING = "manifest.deleting"
_CHUNK = 1 << 22
_NAME_BYTES = 255
_READERS = 8
"""Files that a tool of one process reads at a time: reading and CRC-32 leave Python's lock."""
_Found = TypeVar("_Found")


class ManifestError(Exception):
    """Why a manifest, or a name in it, cannot be trusted; one line."""


class Entry(BaseModel):
    """A file of a checkpoint: ``size`` in bytes and ``crc32``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    size: int = Field(ge=0, lt=2**63)
    crc32: int = Field(ge=0, lt=2**32)


class _Record(BaseModel):
    """A manifest as it is written."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    notes: dict[str, JsonValue]
    files: dict[str, Entry] = Field(min_length=1)
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``files`` by their POSIX path within the folder; ``notes`` are the writer's own, as JSON.

    ``bound``: whether each file says, within, of which save it is.
    """

    notes: dict[str, Any]
    files: dict[str, Entry]
    bound: bool


def list_files(folder: Path) -> list[str]:
    """The POSIX paths of all files under ``folder``, sorted, its manifest left out.

    Raises ``ManifestError`` for what is neither a file nor a folder.
    """
    names = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ManifestError(f"{path.name} is no regular file")
        if path.is_file() and path != folder / NAME and not path.name.endswith(PARTIAL):
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def measure(path: Path, *, sync: bool = False) -> Entry:
    """Size and checksum of a file; with ``sync`` it is on the disk when this returns.

    Raises ``OSError`` and ``Unreadable``.
    """
    size, crc = 0, 0
    with open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return Entry(size=size, crc32=crc)


def at_once(function: Callable[[str], _Found], names: Iterable[str]) -> list[_Found]:
    """What the function finds of each file, in the order of the names; several are read at a time."""
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, names))


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
    except Unreadable as reason:
        return f"{name} {reason}"
    except ManifestError as error:
        return str(error)


def inside(folder: Path, name: str) -> Path:
    """The path of ``name`` within ``folder``; raises ``ManifestError`` where it would leave it.

    A name is relative, without ``..``, and no part of it is a symbolic link.
    """
    parts = PurePosixPath(name).parts
    strange = not name.isprintable() or any(len(os.fsencode(part)) > _NAME_BYTES for part in parts)
    if not parts or strange or "\\" in name or ":" in name or name.startswith("/") or ".." in parts:
        raise ManifestError(f"the manifest names {short(repr(name))}, which is no path within the checkpoint")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(f"{name} is a symbolic link")
    if path.exists() and not path.is_file():
        raise ManifestError(f"{name} is no regular file")
    return path


def seal(folder: Path, notes: Mapping[str, Any], files: Mapping[str, Entry], *, bound: bool = True) -> None:
    """Write the manifest of a folder whose files are on the disk, and say of which save they are unless not ``bound``.

    One process; raises ``OSError``.
    """
    for path in {folder, *(folder / name for name in files)}:
        sync_folder(path if path.is_dir() else path.parent)
    body = {
        "format": FORMAT if bound else UNBOUND,
        "notes": dict(notes),
        "files": {name: files[name].model_dump() for name in sorted(files)},
    }
    write_atomic(folder / NAME, json.dumps({**body, "crc32": _crc(body)}, indent=1) + "\n")
    sync_folder(folder.parent)


def seal_folder(folder: Path, notes: Mapping[str, Any], *, bound: bool = True) -> None:
    """Seal whatever files are in ``folder``: for tools of one process.

    Raises what ``measure`` and ``list_files`` do.
    """
    names = list_files(folder)
    entries = at_once(lambda name: measure(folder / name, sync=True), names)
    seal(folder, notes, dict(zip(names, entries, strict=True)), bound=bound)


def read(folder: Path) -> Manifest:
    """The manifest of a folder; raises ``ManifestError`` where it is not as it was written, or names outer paths."""
    try:
        raw = parse_json(read_bytes(folder / NAME))
        record = typed(raw, _Record)
        if record.crc32 != _crc({key: raw[key] for key in ("format", "notes", "files")}):
            raise ManifestError(f"{NAME} has other bits than were written (CRC-32)")
    except Unreadable as reason:
        raise ManifestError(f"{NAME} {reason}") from None
    except (ValueError, RecursionError):
        raise ManifestError(f"{NAME} is damaged") from None
    if record.format not in (UNBOUND, FORMAT):
        raise ManifestError(f"{NAME} is of format {record.format}, this version reads {UNBOUND} and {FORMAT}")
    try:
        for name in record.files:
            inside(folder, name)
    except OSError as error:
        raise ManifestError(f"{NAME} names {short(repr(name))}: {error.strerror}") from None
    return Manifest(notes=record.notes, files=record.files, bound=record.format != UNBOUND)


def remove(folder: Path, seals: Iterable[str] = (NAME,)) -> None:
    """Delete a checkpoint, its ``seals`` first: one that is half deleted never counts. Raises ``OSError``.

    Of a link the link alone goes: what it leads to is somebody's archive.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    for name in seals:
        if os.path.lexists(folder / name):
            (folder / name).replace(folder / _DELETING)
            sync_folder(folder)
    shutil.rmtree(folder)


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
