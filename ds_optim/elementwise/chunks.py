"""Walk flat tensors chunk by chunk, with scratch that is made once and never grows beyond a few chunks.

An elementwise step is some ten passes; done over whole tensors each would go to main memory, and scratch
would be as large as the tensors. Done over a chunk that stays in cache, memory is read and written once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise import native
from ds_optim.elementwise.momentum import Flat, Stored

# CPU, one thread: small chunks pay for dispatch, large ones for memory. Lion's step over 10M elements took
# 53, 43, 29, 28, 31, 32 and 50 ms with chunks of 2^14 ... 2^20 (1 MiB L2, 32 MiB L3).
CPU_CHUNK = 1 << 17
# ATen gives a thread at least so many elements: with many threads a chunk must be larger for all to work.
CPU_GRAIN = 1 << 15
# CUDA, where no kernel does the work: a launch costs the same for any size, and a chunk is bounded so that scratch is.
CUDA_CHUNK = 1 << 22
CUDA_SCRATCH = 1 << 28
"""Bytes that such a step allocates at most, with buffers and what each operation makes."""
CUDA_SCRATCH_ELEMENT = 84
"""The same for an element of a short slice: with noise, momentum in int8 and weights in bfloat16."""


def chunk_elements(device: torch.device) -> int:
    """Elements of a chunk on ``device``."""
    if device.type == "cpu":
        return max(CPU_CHUNK, CPU_GRAIN * torch.get_num_threads())
    return CUDA_CHUNK


class Scratch:
    """Buffers of at most one chunk, lent to one walk at a time and kept for the next.

    A caller that steps many tensors makes one Scratch and hands it to each call; without one, a call makes its own.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)

    @contextmanager
    def lend(self, like: Flat, narrow: int, wide: int = 0) -> Iterator[list[Tensor]]:
        """``narrow`` buffers of the dtype of ``like``, then ``wide`` ones of fp64, contents undefined.

        As long as the first chunk of ``like``, on its device. What is lent is nobody else's until it is given back, so
        that no two are one, whatever the dtypes and however walks are nested.
        """
        size = min(like.numel(), chunk_elements(like.device))
        dtypes = [like.dtype] * narrow + [torch.float64] * wide
        lent = [self._buffer(like.device, dtype, size) for dtype in dtypes]
        try:
            yield [buffer[:size] for buffer in lent]
        finally:
            for buffer in lent:
                self._free[buffer.device, buffer.dtype].append(buffer)

    def _buffer(self, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
        free = self._free[device, dtype]
        buffer = free.pop() if free else None
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=device)
        return buffer

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(buffer.numel() * buffer.element_size() for free in self._free.values() for buffer in free)


def chunks(*tensors: Flat | None, buffers: list[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Views of equally long flat tensors, chunk by chunk in step, None for None, and ``buffers`` cut to their length.

    Of a :class:`Stored` one a chunk of values in fp32, which are rounded back to it, unless it is read only, when the
    caller asks for the next chunk. The views come from ``split``: slicing one by one costs a dispatch each.
    """
    if any(isinstance(tensor, Stored) for tensor in tensors):
        yield from _stored_chunks(tensors, buffers)
        return
    like = next(tensor for tensor in tensors if isinstance(tensor, Tensor))
    step = chunk_elements(like.device)
    views = (tensor.split(step) if isinstance(tensor, Tensor) else repeat(tensor) for tensor in tensors)
    for row in zip(*views, strict=False):
        numel = next(view for view in row if isinstance(view, Tensor)).numel()
        yield *row, *_cut(buffers, numel)


def spans(first: Flat, *others: Flat, scratch: Scratch, narrow: int, wide: int = 0) -> Iterator[tuple[Any, ...]]:
    """As :func:`chunks`, with ``narrow`` buffers of the dtype of ``first`` and ``wide`` ones of fp64.

    Tensors that the compiled kernels know come whole, with None for each buffer: a kernel needs none.
    """
    if native.suits(first, *others):
        yield first, *others, *repeat(None, narrow + wide)
        return
    with scratch.lend(first, narrow, wide) as buffers:
        yield from chunks(first, *others, buffers=buffers)


def _stored_chunks(tensors: Sequence[Flat | None], buffers: list[Tensor]) -> Iterator[tuple[Any, ...]]:
    like = next(tensor for tensor in tensors if tensor is not None)
    step = chunk_elements(like.device)
    first = next(tensor for tensor in tensors if isinstance(tensor, Stored)).first_chunk(step)
    sizes = _sizes(like.numel(), first, step)
    views = [tensor.split(sizes) if isinstance(tensor, Tensor) else None for tensor in tensors]
    stored = {place: tensor for place, tensor in enumerate(tensors) if isinstance(tensor, Stored)}
    longest = max(sizes)
    widened = {
        place: torch.empty(longest, dtype=values.dtype, device=values.device) for place, values in stored.items()
    }
    position = 0
    for number, numel in enumerate(sizes):
        row: list[Tensor | None] = [None if view is None else view[number] for view in views]
        for place, tensor in stored.items():
            values = row[place] = widened[place][:numel]
            if not native.load(tensor, position, values):
                tensor.load(position, values)
        yield *row, *_cut(buffers, numel)
        for place, tensor in stored.items():
            values = widened[place][:numel]
            if tensor.writable and not native.store(tensor, position, values):
                tensor.store(position, values)
        position += numel


def _cut(buffers: list[Tensor], numel: int) -> list[Tensor]:
    return buffers if not buffers or numel == buffers[0].numel() else [buffer[:numel] for buffer in buffers]


def _sizes(numel: int, first: int, step: int) -> list[int]:
    """Chunks of ``step`` elements, the first one of ``first``, the last one of what is left."""
    if numel <= first:
        return [numel]
    whole, rest = divmod(numel - first, step)
    return [first, *([step] * whole), *([rest] if rest else [])]
