"""Where documents come from: the shipped text, local files, or a set on the hub. A document is a string."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import IO, Any

from ds_optim.errors import UserError

SHIPPED = "shakespeare"
HUB = "hub:"
_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".json", ".parquet")


def is_streamed(data: str) -> bool:
    """Whether documents arrive one by one and are never all held."""
    return data.startswith(HUB)


def load_documents(data: str) -> list[str]:
    """All documents of a local source, in a fixed order; empty ones are left out.

    ``data`` is ``shakespeare`` (the shipped text), a file, a folder or a glob pattern; a text file is one
    document, a line of JSONL or a row of parquet is one (its field ``text``). Raises ``UserError`` where
    nothing can be read.
    """
    if data == SHIPPED:
        with as_file(files("ds_optim.train") / "text" / "shakespeare.jsonl.xz") as path:
            return list(_read_jsonl(path))
    documents = [text for path in _paths(data) for text in _read(path) if text.strip()]
    if not documents:
        raise UserError(f"--data {data!r} holds no text; give a file with text in it, or {SHIPPED}")
    return documents


def stream_documents(data: str, skip: int = 0) -> Iterator[str]:
    """Documents of ``hub:REPOSITORY[:CONFIG[:SPLIT]]``, streamed through ``datasets``, from the ``skip``-th
    on.

    REPOSITORY may be a local folder that ``datasets`` can load.
    """
    from datasets import load_dataset

    repository, config, split = _hub_parts(data)
    try:
        rows = load_dataset(repository, config, split=split, streaming=True)
    except Exception as error:  # datasets raises a type of its own for each way a name can be wrong
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot open the data set {data!r}: {reason}") from None
    yield from _texts(rows.skip(skip) if skip else rows, data)


def _hub_parts(data: str) -> tuple[str, str | None, str]:
    parts = data.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(
            f"--data {data!r} is not hub:REPOSITORY[:CONFIG[:SPLIT]], as in hub:HuggingFaceFW/fineweb:sample-10BT"
        )
    config = parts[1] if len(parts) > 1 and parts[1] else None
    return parts[0], config, parts[2] if len(parts) > 2 else "train"


def _paths(data: str) -> list[Path]:
    """The files that ``data`` names, sorted by path, so that every rank and machine sees one order."""
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _SUFFIXES)
        if not found:
            raise UserError(f"--data {data!r}: no file of {', '.join(_SUFFIXES)} in this folder")
        return found
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"--data {data!r}: no such file or folder; give a path, a glob, {SHIPPED} or {HUB}REPOSITORY")
    return found


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, under a compression suffix if there is one."""
    return Path(path.stem).suffix.lower() if path.suffix in (".xz", ".gz") else path.suffix.lower()


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read(path: Path) -> Iterable[str]:
    kind = _kind(path)
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        if kind in (".jsonl", ".json"):
            return list(_read_jsonl(path))
        with _open(path) as file:
            return [file.read()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, or leave it out of --data") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None
            yield _text_of(row, f"{path}, line {number}")


def _read_parquet(path: Path) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # a broken file surfaces as one of many arrow and datasets types
        raise UserError(f"cannot read {path} as parquet: {' '.join(str(error).split())[:200]}") from None
    return list(_texts(rows, str(path)))


def _texts(rows: Iterable[Any], where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, f"{where}, row {number}")


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'{where} has no string field "text"; rename the field that holds the text')
    return row["text"]
