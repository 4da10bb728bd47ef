"""Text to token ids: bytes, a byte-level BPE trained on the run's own text, or a tokenizer of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from ds_optim.errors import UserError
from ds_optim.job.models import reason_of
from ds_optim.machine.files import Unreadable, read_json, write_atomic

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Tokenizer(Protocol):
    """``eos`` ends every document; ids are below ``vocab_size``."""

    vocab_size: int
    eos: int

    def encode(self, text: str) -> Ids:
        """The ids of one document, ``eos`` not among them; shape (tokens,)."""
        ...

    def serialized(self) -> str:
        """All that decides the ids of a text."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eos = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def serialized(self) -> str:
        return "bytes"


class BpeTokenizer:
    """A byte-level BPE of the ``tokenizers`` library; token 0 ends a document."""

    eos = 0

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(serialized)
        self.vocab_size = self._backend.get_vocab_size()

    def encode(self, text: str) -> Ids:
        return np.asarray(self._backend.encode(text).ids, dtype=np.int32)

    def serialized(self) -> str:
        return str(self._backend.to_str())


class HubTokenizer:
    """A tokenizer that ``transformers`` loads from a folder or the hub."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._backend = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # transformers raises many types for a wrong name
            raise UserError(f"cannot load the tokenizer {name!r}: {reason_of(error)}") from None
        if self._backend.eos_token_id is None:
            raise UserError(
                f"the tokenizer {name!r} has no end-of-text token, which ends documents; use bytes or bpe:N"
            )
        self.vocab_size = len(self._backend)
        self.eos = int(self._backend.eos_token_id)

    def encode(self, text: str) -> Ids:
        return np.asarray(self._backend.encode(text, add_special_tokens=False), dtype=np.int32)

    def serialized(self) -> str:
        fast = getattr(self._backend, "backend_tokenizer", None)
        # One that is no fast tokenizer shows its vocabulary alone.
        known = fast.to_str() if fast is not None else sorted(self._backend.get_vocab().items())
        return json.dumps([type(self._backend).__name__, self.eos, known])


class _Kept(BaseModel):
    """A serialized tokenizer and its digest: another merge, by a flipped bit, would be another text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tokenizer: str
    sha256: str


def train_bpe(documents: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE of at most ``vocab_size`` tokens, serialized; the same documents give the same one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer=trainer)
    return backend.to_str()


def cached_bpe(documents: Sequence[str], vocab_size: int, cache: Path | None) -> str:
    """A serialized BPE of these documents, kept in the folder ``cache`` if one is given.

    The file's name carries the size and a digest of the documents, so that other text never meets an old one. A file
    that is not as it was written is trained anew, which gives the same.
    """
    if cache is None:
        return train_bpe(documents, vocab_size)
    path = cache / f"tokenizer-bpe{vocab_size}-{_digest(documents)}.json"
    with suppress(Unreadable):
        kept = read_json(path, _Kept)
        if kept.sha256 == _sha256(kept.tokenizer):
            return kept.tokenizer
    made = train_bpe(documents, vocab_size)
    with suppress(OSError):  # the next run trains it again
        write_atomic(path, _Kept(tokenizer=made, sha256=_sha256(made)).model_dump_json())
    return made


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Ids:
    """All documents in one row of ids, each ended by ``eos``; shape (tokens,)."""
    end = np.array([tokenizer.eos], dtype=np.int32)
    pieces = [piece for text in documents for piece in (tokenizer.encode(text), end)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


def unigram_entropy(ids: Ids) -> float:
    """Entropy of the token frequencies of ``ids``, in nats per token: the best loss without context."""
    counts = np.bincount(ids)
    shares = counts[counts > 0] / ids.size
    return float(-(shares * np.log(shares)).sum())


def _digest(documents: Sequence[str]) -> str:
    return _sha256(json.dumps(list(documents)))[:12]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
