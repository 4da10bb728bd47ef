"""Streams and events of a CUDA that is not there: they run nothing, and hold whoever uses them to the order.

What a stream beside the current one copies may be touched by nothing, nor what it copies from be freed, until the host
has waited for an event that was recorded behind the copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class FakeStreams:
    """What ``torch.cuda`` has of them. asked: how often for what; late: the most copies' events not yet waited for."""

    asked: Counter[str] = field(default_factory=Counter)
    late: int = 0
    _side: Stream | None = None
    _busy: set[int] = field(default_factory=set)

    def Stream(self, device: Any) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: Any) -> None:
        return None

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        assert self._side is None
        assert stream.follows, "what made the tensors may still be at work on the current stream"
        self._side = stream
        try:
            yield
        finally:
            self._side, stream.follows = None, False

    def copied(self, target: Tensor, source: Tensor) -> None:
        if self._side is None:
            self.touched([target, source])
            return
        self.asked["copies"] += 1
        keys = {key_of(target), key_of(source)}
        self._side.copying |= keys
        self._busy |= keys

    def touched(self, tensors: list[Tensor]) -> None:
        assert not self._busy.intersection(map(key_of, tensors)), "a copy is under way, and nobody has waited for it"

    def freed(self, key: int) -> None:
        """Where nothing can be raised: who counts is to look."""
        self.asked["freed too early"] += key in self._busy


@dataclass
class Stream:
    owner: FakeStreams
    follows: bool = False
    copying: set[int] = field(default_factory=set)

    def wait_stream(self, other: None) -> None:
        self.owner.asked["waits of the stream"] += 1
        self.follows = True


@dataclass
class Event:
    owner: FakeStreams
    behind: set[int] | None = None

    def record(self, stream: Stream) -> None:
        self.behind, stream.copying = stream.copying, set()
        self.owner.asked["events"] += 1
        self.owner.late = max(self.owner.late, self.owner.asked["events"] - self.owner.asked["waits of the host"])

    def synchronize(self) -> None:
        assert self.behind is not None, "waited for before it was recorded"
        self.owner.asked["waits of the host"] += 1
        self.owner._busy -= self.behind


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
