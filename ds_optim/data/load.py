"""The text of a run: documents, split, tokenizer and batches, with errors that all ranks share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from ds_optim.data.batches import Batches, BatchShape, PackedBatches, StreamBatches, window_count
from ds_optim.data.split import kept, split_documents, training_index
from ds_optim.data.text_source import is_streamed, left_out, load_documents, stream_documents
from ds_optim.data.tokens import (
    BpeTokenizer,
    ByteTokenizer,
    HubTokenizer,
    Ids,
    Tokenizer,
    cached_bpe,
    encode_documents,
    unigram_entropy,
)
from ds_optim.errors import UserError
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks

# How many documents of a stream a BPE is trained on.
_BPE_DOCUMENTS = 5_000
# How many documents of a stream stand for all of it where runs are compared.
_HEAD = 200


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Training batches and validation ids; ``unigram_entropy`` of the latter, in nats per token.

    ``text_digest``: of all documents in their order; of a stream, of its first ``_HEAD``. ``tokenizer_digest``: of all
    that decides ids.
    """

    batches: Batches
    validation: Ids
    unigram_entropy: float
    vocab_size: int
    eos: int
    notes: tuple[str, ...]
    text_digest: str
    tokenizer_digest: str


def load_data(settings: TrainSettings, shape: BatchShape) -> TextData:
    """Text, tokenizer and batches of a run; raises the same ``UserError`` on every rank. Collective."""
    if is_streamed(settings.data):
        return _streamed(settings, shape)
    train, held, note = ranks.together(lambda: split_documents(load_documents(settings.data)))
    left = ranks.together(lambda: left_out(settings.data))
    tokenizer = _make_tokenizer(settings, train)
    ids, validation = ranks.together(lambda: (encode_documents(tokenizer, train), encode_documents(tokenizer, held)))
    ranks.together(lambda: _check_length(settings, ids, "training"))
    ranks.together(lambda: _check_length(settings, validation, "validation"))
    texts, tokens = _same_digests([*train, *held], tokenizer)
    ranks.same_everywhere("the ids of the text of --data", _digest(ids, validation))
    return TextData(
        batches=PackedBatches(ids, shape, settings.seed),
        validation=validation,
        unigram_entropy=unigram_entropy(validation),
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
        notes=tuple(line for line in (left, note) if line is not None),
        text_digest=texts,
        tokenizer_digest=tokens,
    )


def _streamed(settings: TrainSettings, shape: BatchShape) -> TextData:
    def documents(first: int) -> Iterator[str]:
        """Training documents of the stream, from the ``first``-th on."""
        skip = training_index(first)
        return kept(stream_documents(settings.data, skip), skip, validation=False)

    def sample() -> list[str]:
        return list(islice(documents(0), _BPE_DOCUMENTS)) if settings.tokenizer.startswith("bpe:") else []

    tokenizer = _make_tokenizer(settings, ranks.together(sample))
    wanted = settings.eval_batches * shape.tokens + 1
    validation, head = ranks.together(lambda: _stream_validation(settings.data, tokenizer, wanted))
    ranks.together(lambda: _check_length(settings, validation, "validation"))
    texts, tokens = _same_digests(head, tokenizer)
    ranks.same_everywhere("the ids of the text of --data", _digest(validation))
    left = ranks.together(lambda: left_out(settings.data))
    note = f"validation text: the first {validation.size:,} tokens of held-out documents of the stream"
    return TextData(
        batches=StreamBatches(lambda first: (encode_documents(tokenizer, [text]) for text in documents(first)), shape),
        validation=validation,
        unigram_entropy=unigram_entropy(validation),
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
        notes=tuple(line for line in (left, note) if line is not None),
        text_digest=texts,
        tokenizer_digest=tokens,
    )


def _stream_validation(data: str, tokenizer: Tokenizer, wanted: int) -> tuple[Ids, list[str]]:
    """The first ``wanted`` ids of the held-out documents of a stream, or as many as there are, and its first
    documents."""
    pieces: list[Ids] = []
    found = 0
    stream = stream_documents(data)
    head = list(islice(stream, _HEAD))
    for text in kept(chain(head, stream), 0, validation=True):
        pieces.append(encode_documents(tokenizer, [text]))
        found += pieces[-1].size
        if found >= wanted:
            break
    return np.concatenate(pieces)[:wanted] if pieces else np.empty(0, dtype=np.int32), head


def _make_tokenizer(settings: TrainSettings, train: list[str]) -> Tokenizer:
    """The tokenizer of the run; a BPE is trained on rank 0 and sent to the others."""
    kind, _, rest = settings.tokenizer.partition(":")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "hf":
        return ranks.together(lambda: HubTokenizer(rest))
    return BpeTokenizer(ranks.from_first(lambda: cached_bpe(train, int(rest), settings.out)))


def _check_length(settings: TrainSettings, ids: Ids, part: str) -> None:
    if window_count(ids, settings.seq_len) < 1:
        raise UserError(
            f"the {part} part of --data {settings.data!r} has {ids.size} tokens, fewer than one sequence of"
            f" {settings.seq_len} and its next token; give more text or a smaller --seq-len"
        )


def _same_digests(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[str, str]:
    """The digests of text and tokenizer, the same on every rank. Collective."""
    found = _digest_texts(texts), _digest_texts([tokenizer.serialized()])
    for what, digest in zip(("the text of --data", "the tokenizer"), found, strict=True):
        ranks.same_everywhere(what, digest)
    return found


def _digest_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()[:16]


def _digest(*parts: Ids) -> str:
    digest = hashlib.sha256()
    for ids in parts:
        digest.update(ids.tobytes())
    return digest.hexdigest()
