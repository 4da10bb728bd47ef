"""What was measured before is never written over unasked: a folder of its own for each run, or a line and no run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from ds_optim.errors import UserError

RESULTS, RUN_FILE = "results.jsonl", "run.json"
"""The files of a run: its rows, and what it was."""


def holds(folder: Path, names: Sequence[str]) -> str | None:
    """The first of these files that ``folder`` has, and that is not empty."""
    for name in names:
        path = folder / name
        if path.is_file() and path.stat().st_size:
            return name
    return None


def refuse(folder: Path, names: Sequence[str], instead: str) -> None:
    """Raise ``UserError`` where ``folder`` has one of these files of an earlier run."""
    found = holds(folder, names)
    if found is not None:
        raise UserError(f"{folder} holds {found} of an earlier run: {instead}")


def free_folder(folder: Path, names: Sequence[str]) -> Path:
    """``folder``, or where it has results already, the first of ``folder-2``, ``folder-3``, ... that has none."""
    return next(path for path in _numbered(folder) if holds(path, names) is None)


def newest_folder(folder: Path, names: Sequence[str]) -> Path:
    """The last of ``folder``, ``folder-2``, ... that has results; ``folder`` where none has."""
    found = folder
    for path in _numbered(folder):
        if holds(path, names) is None:
            return found
        found = path
    return found


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def write_one(out: Path, text: str, what: str, *, force: bool) -> None:
    """Write a file that a command was asked for, but over another text only with ``force``.

    Raises:
        UserError: another text stands there, or it cannot be written; ``what`` it is to hold.
    """
    try:
        if not force and out.exists() and out.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(f"{out} says something else already: add --force to replace it, or give another --out")
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the {what} {str(out)!r}: {error.strerror}") from None
