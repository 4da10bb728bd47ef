"""One file of text: what its suffix says that it holds, and its documents, read one by one."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ds_optim.errors import UserError


def documents_of(path: Path) -> Iterator[str]:
    """The documents of a file: a text file is one, a line of JSONL and a row of all else are one each (the field
    ``text``). A file of another kind is taken for text.

    Raises UserError where it cannot be read, with the line or row at which it ends.
    """
    try:
        yield from _READERS.get(kind_of(path), _text)(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, or leave it out of --data") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, under a compression's if there is one; in lower case."""
    inner = Path(path.stem) if path.suffix.lower() in _COMPRESSIONS else path
    return inner.suffix.lower()


def text_of(row: Any, where: str) -> str:
    """The field ``text`` of a row; ``where`` it stands is for the error."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'{where} has no string field "text"; rename the field that holds the text')
    return row["text"]


def one_line(error: Exception) -> str:
    """What a library says of a failure, as the end of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open(path: Path, newline: str | None = None) -> IO[str]:
    opened = _COMPRESSIONS.get(path.suffix.lower(), lambda given: given.open("rb"))(path)
    # A mark that Windows puts first would be part of the text, or no JSON.
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)


def _open_zst(path: Path) -> Any:
    import pyarrow  # which datasets brings along

    return pyarrow.input_stream(str(path), compression="zstd")


def _text(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read()


def _json(path: Path) -> Iterator[str]:
    """Lines of JSON; or, where its first line is no row, one JSON value: a row, or an array of rows."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), "")
    whole = "" if _is_row(first) else next(_text(path))
    if not whole.lstrip().startswith("[") and not _is_row(whole):
        yield from _json_lines(path)
        return
    try:
        value = json.loads(whole)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield text_of(row, f"{path}, row {number}")


def _is_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _json_lines(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from None
            yield text_of(row, f"{path}, line {number}")


def _csv(path: Path) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents over 128 KiB
    with _open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        try:
            for row in rows:
                yield text_of(row, f"{path}, line {rows.line_num}")
        except csv.Error as error:
            raise UserError(f"{path}, the row after line {rows.line_num} is not CSV: {error}") from None


def _table(path: Path) -> Iterator[str]:
    from datasets import load_dataset

    kind = kind_of(path)[1:]
    try:
        rows = load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # a broken file surfaces as one of many arrow and datasets types
        raise UserError(f"cannot read {path} as {kind}: {one_line(error)}") from None
    yield from texts_of(rows, str(path))


def texts_of(rows: Iterable[Any], where: str, first: int = 1) -> Iterator[str]:
    """The texts of rows, the first of which is the ``first``-th."""
    for number, row in enumerate(rows, start=first):
        yield text_of(row, f"{where}, row {number}")


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zst,
}
_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    **dict.fromkeys((".txt", ".md", ".text"), _text),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    **dict.fromkeys((".parquet", ".arrow"), _table),
}
KINDS = tuple(_READERS)
COMPRESSIONS = tuple(_COMPRESSIONS)
