"""Where documents come from: the shipped text, local files, or a set on the hub. A document is a string."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from ds_optim.data.text_files import COMPRESSIONS, KINDS, documents_of, kind_of, one_line, texts_of
from ds_optim.errors import UserError

SHIPPED = "shakespeare"
HUB = "hub:"
#: What datasets and the hub put beside the text.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
#: How many files that are left out are named in full.
_NAMED = 12
#: How long the line at which a stream broke off is looked for.
_SEARCH_S = 60.0


def is_streamed(data: str) -> bool:
    """Whether documents arrive one by one and are never all held."""
    return data.startswith(HUB)


def load_documents(data: str) -> list[str]:
    """All documents of a local source, in a fixed order; empty ones are left out.

    ``data`` is ``shakespeare`` (the shipped text), a file, a folder or a glob pattern; a text file is one
    document, a line of JSONL or a row of anything else is one (its field ``text``), compressed or not. Raises
    ``UserError`` where nothing can be read.
    """
    if data == SHIPPED:
        with as_file(files("ds_optim.data") / "text" / "shakespeare.jsonl.xz") as path:
            return list(documents_of(path))
    documents = [text for path in _paths(data) for text in documents_of(path) if text.strip()]
    if not documents:
        raise UserError(f"--data {data!r} holds no text; give a file with text in it, or {SHIPPED}")
    return documents


def left_out(data: str) -> str | None:
    """A line that names the files of a folder that are not read; None where all are, or ``data`` is no folder."""
    folder = Path(data.removeprefix(HUB).partition(":")[0]).expanduser()
    if data == SHIPPED or not folder.is_dir():
        return None
    every = sorted(_walk(folder))
    read = _streamed_files(data) if is_streamed(data) else {path for path in every if _is_text(path)}
    names = [str(path.relative_to(folder)) for path in every if path not in read]
    if not names:
        return None
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return (
        f"--data {data!r}: {len(names):,} of {len(every):,} files are left out (hidden, metadata, or of another kind):"
        f" {', '.join(names[:_NAMED])}{more}"
    )


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
        raise UserError(f"cannot open the data set {data!r}: {one_line(error)}") from None
    read = skip
    try:
        for text in texts_of(rows.skip(skip) if skip else rows, data, first=skip + 1):
            yield text
            read += 1
    except UserError:
        raise
    except Exception as error:  # as above; and the network, and what is broken in a file of it
        place = _broken_line(repository) or f"--data {data!r} ends after row {read}: {one_line(error)}"
        raise UserError(place) from None


def _streamed_files(data: str) -> set[Path]:
    """The files of a local folder that ``datasets`` reads: of one kind alone, that of most."""
    from datasets import load_dataset_builder

    repository, config, _ = _hub_parts(data)
    splits = load_dataset_builder(repository, config).config.data_files or {}
    return {Path(repository).expanduser() / os.path.relpath(path, repository) for of in splits.values() for path in of}


def _broken_line(repository: str) -> str | None:
    """The first file and line of a local data set that cannot be read: ``datasets`` names neither."""
    folder, started = Path(repository), time.monotonic()
    for path in sorted(_walk(folder)) if folder.is_dir() else ():
        try:
            for _ in documents_of(path) if _is_text(path) else ():
                if time.monotonic() - started > _SEARCH_S:
                    return None
        except UserError as error:
            return str(error)
    return None


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
    if not data:
        raise UserError(f"--data is empty; give a path, a glob, {SHIPPED} or {HUB}REPOSITORY")
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(file for file in _walk(path) if _is_text(file))
        if not found:
            kinds = f"{', '.join(KINDS)}, plain or as {', '.join(COMPRESSIONS)}"
            raise UserError(f"--data {data!r}: no file of {kinds} in this folder")
        return found
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"--data {data!r}: no such file or folder; give a path, a glob, {SHIPPED} or {HUB}REPOSITORY")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Every file under a folder, also where links to folders lead, each folder once; of a hidden folder its name."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders) - set(hidden))  # else what is read once would depend on the disk's order
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in (*hidden, *names))


def _is_text(path: Path) -> bool:
    """Whether a file of a folder is read: hidden ones, a cache's or an editor's, are not."""
    return not path.name.startswith(".") and path.name not in _METADATA and kind_of(path) in KINDS and path.is_file()
