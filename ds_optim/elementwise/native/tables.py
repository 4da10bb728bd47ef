"""Steps of many slices of a flat partition by one call: a row of a table for each, built once (``tables.c``).

Each says whether it could do the work; if not, nothing was touched. A slice gets the bits of a call of its own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_double, c_float, c_int64, c_uint64
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import BLOCK, Flat, Int8, scales_numel
from ds_optim.elementwise.native import calling, steps
from ds_optim.elementwise.native.calling import BlendWeights


class Row(NamedTuple):
    """A slice: where its first element lies in the partition (``place``), beside it in a message or stack (``at``), its
    first block among the partition's, stream and start of its noise, and the scale of its update."""

    numel: int
    place: int
    at: int
    block: int
    stream: int
    start: int
    scale: float = 1.0


class _Row(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("numel", "place", "at", "block")),
        *((name, c_uint64) for name in ("stream", "start")),
        ("scale", c_double),
    )


_Jobs = tuple[Any, list[tuple[int, int]]]
"""Rows as C has them, and for each job the first one and how many."""


class Table:
    """Slices that lie in one partition; none overlap."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row.numel]
        self.numel = sum(row.numel for row in self.rows)
        self._own = max((row.place + row.numel for row in self.rows), default=0)
        self._beside = max((row.at + row.numel for row in self.rows), default=0)
        self._blocks = max((row.block + scales_numel(row.start, row.numel) for row in self.rows), default=0)
        self._jobs: dict[int, _Jobs] = {}

    def holds(self, own: Sequence[Flat | None], beside: Flat) -> bool:
        """Whether all slices lie in these tensors, of the partition and beside it."""
        scales = [tensor.scales.numel() for tensor in own if isinstance(tensor, Int8)]
        lengths = [tensor.numel() for tensor in own if tensor is not None]
        inside = min(lengths) >= self._own and beside.numel() >= self._beside
        return inside and all(blocks >= self._blocks for blocks in scales)

    def call(self, name: str, *arguments: Any) -> bool:
        """Call a kernel of this name, on as many of torch's threads as there is work for."""
        function: Any = getattr(steps.library(), f"ds_optim_{name}")
        threads = max(1, min(torch.get_num_threads(), self.numel // calling.GRAIN))
        if threads not in self._jobs:
            self._jobs[threads] = self._dealt(threads)
        rows, jobs = self._jobs[threads]
        parts: list[Any] = [(c_int64(count), ctypes.byref(rows, first * ctypes.sizeof(_Row))) for first, count in jobs]
        if threads == 1:
            for part in parts:
                function(*part, *arguments)
            return True
        pool = calling.pool(threads, os.getpid())
        for job in [pool.submit(function, *part, *arguments) for part in parts]:
            job.result()
        return True

    def _dealt(self, threads: int) -> _Jobs:
        """Rows for so many threads, cut where no block is, and dealt out in jobs of about equal work."""
        if threads == 1:
            return _in_c(self.rows), [(0, len(self.rows))]
        width = calling.width_of(self.numel, threads, BLOCK)
        cut = [piece for row in self.rows for piece in _cut(row, width)]
        firsts, held = [0], 0
        for number, row in enumerate(cut):
            if held + row.numel > width:
                firsts.append(number)
                held = 0
            held += row.numel
        return _in_c(cut), [(a, b - a) for a, b in pairwise([*firsts, len(cut)])]


def _in_c(rows: Sequence[Row]) -> ctypes.Array[_Row]:
    return (_Row * len(rows))(*(_Row(*row) for row in rows))


def _cut(row: Row, width: int) -> Iterator[Row]:
    """A slice in pieces of at most ``width`` elements, a multiple of blocks."""
    head = -row.start % BLOCK
    edges = [0, *range(head + width - (BLOCK if head else 0), row.numel, width), row.numel]
    for begin, end in pairwise(edges):
        block = row.block + (row.start + begin) // BLOCK - row.start // BLOCK
        places = {"place": row.place + begin, "at": row.at + begin, "start": row.start + begin}
        yield row._replace(numel=end - begin, block=block, **places)


def sign_steps(
    table: Table, p: Flat, m: Flat | None, g: Flat, weights: steps.Weights, lr: float, factor: float
) -> bool:
    """``steps.sign_step`` of each row; g lies beside the partition. The tensors' own noise keys say seed and step."""
    if steps.library() is None or not steps.real(p, g) or not steps.known(m) or not table.holds((p, m), g):
        return False
    arrays = (steps.array(tensor) for tensor in (p, m, g))
    return table.call("sign_steps", *arrays, BlendWeights(*weights), c_float(lr), c_float(factor))


def adamw_steps(table: Table, p: Flat, m: Tensor, v: Tensor, g: Flat, numbers: steps.AdamW) -> bool:
    """``steps.adamw_step`` of each row; g lies beside the partition."""
    if steps.library() is None or not steps.real(p, g) or not all(map(calling.is_plain, (m, v))):
        return False
    if not table.holds((p, m, v), g):
        return False
    return table.call("adamw_steps", *(steps.array(tensor) for tensor in (p, m, v, g)), steps.Adam(*numbers))


def blends(table: Table, out: Tensor, m: Flat | None, g: Flat, weights: steps.Weights) -> bool:
    """``steps.blend_into`` of each row; out lies beside the partition."""
    if steps.library() is None or not steps.real(g) or not steps.known(m) or not steps.takes_blends(out):
        return False
    if not table.holds((m, g), out):
        return False
    return table.call("blends", *(steps.array(tensor) for tensor in (out, m, g)), BlendWeights(*weights))


def apply_updates(table: Table, p: Flat, update: Tensor, rate: float, factor: float) -> bool:
    """``steps.apply_update`` of each row, by ``rate`` times its scale; update lies beside the partition."""
    if steps.library() is None or not steps.real(p) or not steps.is_update(update) or not table.holds((p,), update):
        return False
    return table.call("apply_updates", steps.array(p), steps.array(update), c_double(rate), c_float(factor))
