"""The way of results back to where slices lie: from an accelerator to the host, beside the work that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda

from ds_optim.sharding.lines import Lines, Values, call


class _UnderWay(NamedTuple):
    """results: held until their copies are ``done``, so that nobody is given their memory before."""

    lines: Sequence[Lines]
    results: Sequence[Sequence[Tensor]]
    copies: list[list[Tensor]]
    done: Any


class Returns:
    """Results of one exchange, applied in the order in which they are given.

    Where slices lie on the host, a stream of its own copies them into pinned memory, and they are applied when the next
    ones have been given: the device works on those meanwhile, and the host waits for a copy before anything reads it.
    """

    def __init__(self, apply: Values, device: torch.device, home: torch.device) -> None:
        self._apply = apply
        self._device = device
        self._home = home
        self._stream = cuda.Stream(device) if device.type == "cuda" and home != device else None
        self._under_way: list[_UnderWay] = []

    def give(self, lines: Sequence[Lines], results: Sequence[Sequence[Tensor]]) -> None:
        """Apply results, or start them on their way and apply those before."""
        if self._stream is None:
            call(self._apply, lines, results)
            return
        self._under_way.append(self._started(lines, results))
        self._settle(leave=1)

    def settle(self) -> None:
        """Apply all that are still under way."""
        self._settle(leave=0)

    def _settle(self, leave: int) -> None:
        while len(self._under_way) > leave:
            lines, results, copies, done = self._under_way.pop(0)
            done.synchronize()
            del results
            call(self._apply, lines, copies)

    def _started(self, lines: Sequence[Lines], results: Sequence[Sequence[Tensor]]) -> _UnderWay:
        copies = [[self._pinned(one) for one in of_lines] for of_lines in results]
        assert self._stream is not None
        self._stream.wait_stream(cuda.current_stream(self._device))  # what made the results is queued there
        with cuda.stream(self._stream):
            for theirs, ours in zip(copies, results, strict=True):
                for copy, result in zip(theirs, ours, strict=True):
                    copy.copy_(result, non_blocking=True)
            done = cuda.Event()
            done.record(self._stream)
        return _UnderWay(lines, results, copies, done)

    def _pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self._home, pin_memory=True)
