"""Passes over flat tensors that measure or step: by a compiled kernel where there is one that knows the tensors, else
eagerly, chunk by chunk.

The eager function says what the kernel computes, to the bit. It gets the tensors' chunks, then the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise import fused
from ds_optim.elementwise.chunks import Scratch, spans
from ds_optim.elementwise.momentum import Flat
from ds_optim.elementwise.native import rules as native

_JOIN: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum": (0.0, torch.add),
    "min": (float("inf"), torch.minimum),
    "max": (0.0, torch.maximum),
}


def measure(
    kernel: str,
    tensors: Sequence[Flat],
    numbers: Sequence[Any],
    eager: Callable[..., Tensor],
    *,
    scratch: Scratch,
    narrow: int,
    wide: int = 0,
    join: str = "sum",
    columns: int = 1,
) -> Tensor:
    """The numbers of all chunks joined, in fp64: (), or with several (columns,).

    narrow, wide: buffers that ``eager`` takes, as of :func:`chunks.spans`. join: "sum", "min", or of sizes "max".
    """
    found = fused.measure(kernel, tensors, numbers)
    if found is not None:
        return found
    identity, joined = _JOIN[join]
    shape = (columns,) if columns > 1 else ()
    total = torch.full(shape, identity, dtype=torch.float64, device=tensors[0].device)
    with torch.no_grad():
        for row in spans(*tensors, scratch=scratch, narrow=narrow, wide=wide):
            found = native.measure(kernel, row[: len(tensors)], numbers, join=join, columns=columns)
            total = joined(total, eager(*row) if found is None else found)
    return total


def step(
    kernel: str,
    tensors: Sequence[Flat],
    numbers: Sequence[Any],
    eager: Callable[..., object],
    *,
    scratch: Scratch,
    narrow: int,
    wide: int = 0,
) -> None:
    """Move the tensors on, in place."""
    if fused.step(kernel, tensors, numbers):
        return
    with torch.no_grad():
        for row in spans(*tensors, scratch=scratch, narrow=narrow, wide=wide):
            if not native.step(kernel, row[: len(tensors)], numbers):
                eager(*row)
