"""Token ids to batches: which windows of the text a step trains on, from (seed, step) alone.

A window is ``seq_len + 1`` ids, inputs and their next tokens; windows overlap by that one id, so every token
is a target once an epoch. The global batch of a step is cut into micro-batches and ranks after it is chosen:
any number of ranks with an equal global batch sees the same text in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ds_optim.data.tokens import Ids
from ds_optim.errors import UserError

# Encoded documents from the n-th on; a stream is opened again where it is to go on.
OpenStream = Callable[[int], Iterator[Ids]]


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How a global batch of ``micro_batch * accumulation * world_size`` windows is dealt out."""

    seq_len: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def tokens(self) -> int:
        """Targets in a global batch."""
        return self.global_batch * self.seq_len

    def mine(self, windows: np.ndarray[Any, np.dtype[np.int32]]) -> list[torch.Tensor]:
        """This rank's micro-batches of a global batch.

        (global_batch, seq_len + 1) -> accumulation tensors of (micro_batch, seq_len + 1), int64.
        """
        dealt = windows.reshape(self.accumulation, self.world_size, self.micro_batch, self.seq_len + 1)
        return [torch.from_numpy(part.astype(np.int64)) for part in dealt[:, self.rank]]


class Batches(Protocol):
    """The training text of each step."""

    def step(self, index: int) -> list[torch.Tensor]:
        """This rank's micro-batches of step ``index``, each (micro_batch, seq_len + 1)."""
        ...

    def position(self) -> dict[str, int]:
        """Where the text stands after the last step, for a checkpoint."""
        ...

    def restore(self, position: dict[str, int]) -> None:
        """Go on from a ``position``."""
        ...


def window_count(ids: Ids, seq_len: int) -> int:
    """How many windows a row of ids holds."""
    return max(0, (ids.size - 1) // seq_len)


def windows_at(ids: Ids, seq_len: int, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The windows of these indices, (n,) -> (n, seq_len + 1)."""
    return ids[indices[:, None] * seq_len + np.arange(seq_len + 1)]


class PackedBatches:
    """Shuffled windows of a text that is held in memory: each epoch is a permutation of its own."""

    def __init__(self, ids: Ids, shape: BatchShape, seed: int) -> None:
        self._ids = ids
        self._shape = shape
        self._seed = seed
        self._windows = window_count(ids, shape.seq_len)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def step(self, index: int) -> list[torch.Tensor]:
        wanted = np.arange(self._shape.global_batch, dtype=np.int64) + index * self._shape.global_batch
        chosen = np.array([self._window(int(position)) for position in wanted])
        return self._shape.mine(windows_at(self._ids, self._shape.seq_len, chosen))

    def position(self) -> dict[str, int]:
        return {}

    def restore(self, position: dict[str, int]) -> None:
        """Nothing to do: a step's windows follow from its index."""

    def _window(self, position: int) -> int:
        epoch, place = divmod(position, self._windows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._windows)
            self._epoch = epoch
        return int(self._order[place])


class StreamBatches:
    """Windows in the order in which a stream of documents gives them; the stream starts over when it ends."""

    def __init__(self, open_stream: OpenStream, shape: BatchShape) -> None:
        self._open = open_stream
        self._shape = shape
        self._rows: Iterator[Ids] = iter(())
        self._held: Ids = np.empty(0, dtype=np.int32)
        # The held ids are those of document `first` from `offset` on, and of the documents after it, up to
        # `next`.
        self._lengths: list[int] = []
        self._first, self._offset, self._next = 0, 0, 0
        self._documents = 0  # in one pass over the stream; 0 until its end was seen
        self._opened = False

    def step(self, index: int) -> list[torch.Tensor]:
        length = self._shape.seq_len
        self._fill(self._shape.tokens + 1)
        windows = windows_at(self._held, length, np.arange(self._shape.global_batch))
        self._drop(self._shape.tokens)
        return self._shape.mine(windows)

    def position(self) -> dict[str, int]:
        document = self._first % self._documents if self._documents else self._first
        return {"document": document, "offset": self._offset}

    def restore(self, position: dict[str, int]) -> None:
        self._first = self._next = position["document"]
        self._offset = position["offset"]
        self._held, self._lengths = np.empty(0, dtype=np.int32), []
        self._documents, self._opened = 0, False
        if self._offset:
            self._read()
            self._held = self._held[self._offset :]

    def _fill(self, count: int) -> None:
        while self._held.size < count:
            self._read()

    def _read(self) -> None:
        if not self._opened:
            self._rows, self._opened = self._open(self._next), True
        row = next(self._rows, None)
        if row is None:
            if self._next == 0:
                raise UserError("the streamed data set holds no training text; give another --data")
            self._documents = self._next
            self._rows, self._next = self._open(0), 0
            row = next(self._rows)
        self._held = np.concatenate([self._held, row])
        self._lengths.append(row.size)
        self._next += 1

    def _drop(self, count: int) -> None:
        self._held = self._held[count:]
        self._offset += count
        while self._lengths and self._offset >= self._lengths[0]:
            self._offset -= self._lengths.pop(0)
            self._first += 1
