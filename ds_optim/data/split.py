"""Which documents are validation text: decided by a document's place in the source, the same for every seed
and rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

FRACTION = 0.1
CUT = 0.9


def place(index: int) -> float:
    """A fixed pseudo-random number in [0, 1) of the ``index``-th document."""
    digest = hashlib.sha256(f"ds_optim validation split:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_validation(index: int) -> bool:
    """Whether the ``index``-th document of a stream is held out; the first is, so that there is one."""
    return index == 0 or place(index) < FRACTION


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str], str | None]:
    """(training, validation, a note for the user or None) of documents at hand; neither part is empty.

    A single document is cut: its first nine tenths train.
    """
    if len(documents) == 1:
        text = documents[0]
        # A line may be the whole text, so the cut is at a character.
        cut = int(len(text) * CUT)
        note = f"one document: its last {1 - CUT:.0%} is the validation text"
        return [text[:cut]], [text[cut:]], note
    places = [place(index) for index in range(len(documents))]
    held = {index for index, value in enumerate(places) if value < FRACTION}
    if not held:
        held = {min(range(len(places)), key=places.__getitem__)}
    if len(held) == len(documents):
        held.remove(max(range(len(places)), key=places.__getitem__))
    train = [text for index, text in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)], None


def training_index(count: int) -> int:
    """The place in the stream of its ``count``-th (from 0) training document."""
    index = 0
    while True:
        if not is_validation(index):
            if count == 0:
                return index
            count -= 1
        index += 1


def kept(documents: Iterator[str], first: int, *, validation: bool) -> Iterator[str]:
    """The validation or the training documents of a stream whose next document is the ``first``-th."""
    for index, text in enumerate(documents, start=first):
        if is_validation(index) == validation:
            yield text
