"""The study's text: English that a fresh machine gets from Debian's archive by name, and cleans.

It is never kept in the repository. ``debian:NAME+NAME`` names packages; documents are dictionary entries, pages of a
FAQ and manual pages. Anything else is a source of ``ds-optim train --data``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from ds_optim.data.split import split_documents
from ds_optim.data.text_source import is_streamed, load_documents
from ds_optim.data.tokens import BpeTokenizer, ByteTokenizer, Ids, Tokenizer, cached_bpe, encode_documents
from ds_optim.errors import UserError

DEBIAN = "debian:"
SHORTEST = 40
"""Characters of a document at least."""


class Text(NamedTuple):
    """Ids to train on and to validate with; ``digest`` is of both."""

    train: Ids
    validation: Ids
    vocab_size: int
    digest: str


def load_text(source: str, tokenizer: str, cache: Path) -> Text:
    """Ids of a source, made once and kept in ``cache``. Raises ``UserError`` where there is no text."""
    if is_streamed(source):
        raise UserError(f"{source} is a stream: run its cells with ds-optim train (--commands prints them)")
    kept = cache / f"ids-{hashlib.sha256(f'{source} {tokenizer}'.encode()).hexdigest()[:12]}.npz"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        train, held, _ = split_documents(list(documents_of(source)))
        made = _tokenizer(tokenizer, train, cache)
        arrays = {"train": encode_documents(made, train), "validation": encode_documents(made, held)}
        partial = kept.with_suffix(f".{os.getpid()}.npz")  # workers of a first cell each make it
        np.savez(partial, vocab_size=made.vocab_size, **arrays)
        partial.replace(kept)
    with np.load(kept) as found:
        ids, validation, vocab_size = found["train"], found["validation"], int(found["vocab_size"])
    digest = hashlib.sha256(ids.tobytes() + validation.tobytes()).hexdigest()[:16]
    return Text(ids, validation, vocab_size, digest)


def documents_of(source: str) -> Iterator[str]:
    """The documents of a source, in a fixed order."""
    if not source.startswith(DEBIAN):
        yield from load_documents(source)
        return
    for name in source.removeprefix(DEBIAN).split("+"):
        yield from _package(name)


def _package(name: str) -> list[str]:
    """The documents of a Debian package, downloaded and unpacked without root."""
    with TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True, timeout=600)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package, "."], cwd=folder, check=True, capture_output=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise UserError(f"cannot get the Debian package {name} ({error}): give another --data") from None
        documents = [
            text
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not path.is_symlink()
            for text in _file(path)
        ]
    return [text for text in documents if len(text) >= SHORTEST]


def _file(path: Path) -> list[str]:
    if path.name.endswith(".dict.dz"):
        return dictionary_entries(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    if path.suffix == ".html":
        return [plain_html(path.read_text(encoding="utf-8", errors="replace"))]
    if path.suffix == ".pod":
        return [path.read_text(encoding="utf-8", errors="replace").strip()]
    return []


def dictionary_entries(text: str) -> list[str]:
    """The entries of a dict file: a blank line, then a line that does not begin with a space, begins one."""
    return [entry.strip() for entry in re.split(r"\n\s*\n(?=\S)", text) if entry.strip()]


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if self._silent <= 0:
            self.parts.append(data)


def plain_html(page: str) -> str:
    """The words of a page, paragraphs apart."""
    words = _Words()
    words.feed(page)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(words.parts)).strip()


def _tokenizer(name: str, documents: list[str], cache: Path) -> Tokenizer:
    kind, _, size = name.partition(":")
    if kind == "bpe":
        return BpeTokenizer(cached_bpe(documents, int(size), cache))
    return ByteTokenizer()
