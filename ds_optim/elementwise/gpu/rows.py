"""Kernels of steps that take some rows of each matrix: sums of rows, chosen rows into messages, and the step.

As in ``kernels`` a launch takes a table of slices. ``Rows`` says how a slice's elements lie in rows; flags and counts
of rows are read for each element, and nothing is kept for it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ds_optim.elementwise.gpu import tiles
from ds_optim.elementwise.gpu.kernels import decayed, folded, row_of
from ds_optim.elementwise.gpu.tiles import BLOCK, LANES

NAMES = (
    "first", "n", "head", "start", "columns", "rows", "offset", "flags", "before", "p", "m", "g", "key", "counter",
    "step",
)  # fmt: skip
"""first: programs of the slices before. head: elements before the slice in its first block, where p is rounded."""
WORDS, NUMBERS = len(NAMES), 4
"""Numbers: rate, factor, what is kept of momentum, and the rate of cautious decay."""
WIDTH = WORDS + NUMBERS
_WORDS, _WIDTH = tl.constexpr(WORDS), tl.constexpr(WIDTH)


def _kernel(function: Any) -> Any:
    return triton.jit(function, do_not_specialize=["table", "slices"], do_not_specialize_on_alignment=["table"])


@triton.jit
def _number(row: tl.tensor, k: tl.constexpr) -> tl.tensor:
    return tl.load(row + _WORDS + k).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _chosen(row: tl.tensor, base: tl.tensor, mask: tl.tensor, turned: tl.constexpr) -> tl.tuple:
    """Which elements of the tile that begins at ``base`` in the slice are of chosen rows, and each one's place among
    the slice's such elements."""
    element = tl.load(row + 3) + base + tl.arange(0, BLOCK)
    columns, before = tl.load(row + 4), tiles.at(tl.load(row + 8), tl.int64, 0)
    if turned:
        rows = tl.load(row + 5)
        stack = element // (columns * rows)
        rest = element - stack * columns * rows
        line = rest // rows
        number = stack * rows + rest - line * rows
        flags = tl.load(tiles.at(tl.load(row + 7), tl.int8, number), mask=mask, other=0)
        begin = tl.load(before + stack * rows, mask=mask, other=0)
        end = tl.load(before + (stack + 1) * rows, mask=mask, other=0)
        place = begin * columns + line * (end - begin) + tl.load(before + number, mask=mask, other=0) - begin
    else:
        number = element // columns
        flags = tl.load(tiles.at(tl.load(row + 7), tl.int8, number), mask=mask, other=0)
        place = tl.load(before + number, mask=mask, other=0) * columns + element - number * columns
    return flags != 0, place - tl.load(row + 6)


@_kernel
def sum_rows(table: tl.tensor, slices: tl.int32, turned: tl.constexpr) -> None:
    """Write the sums of magnitudes of a slice's rows, in fp64: g, of each row of the parameter. m is fp32.

    A program takes a row, or where they are turned BLOCK rows of a matrix, along all columns in their order.
    """
    program = tl.program_id(0).to(tl.int64)
    row = row_of(table, slices, program, _WIDTH)
    n, start, columns, rows = tl.load(row + 1), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    own = program - tl.load(row)
    total = tl.full([BLOCK], 0.0, tl.float64)
    m, out = tiles.at(tl.load(row + 10), tl.float32, 0), tiles.at(tl.load(row + 11), tl.float64, 0)
    if turned:
        blocks = (rows + BLOCK - 1) // BLOCK
        stack = start // (columns * rows) + own // blocks
        number = own % blocks * BLOCK + tl.arange(0, BLOCK)
        first = stack * columns * rows - start
        low = tl.maximum(0, -first // rows)
        high = tl.minimum(columns, (n - first + rows - 1) // rows)
        for line in range(low, high):
            place = first + line * rows + number
            inside = (number < rows) & (place >= 0) & (place < n)
            total += tl.abs(tl.load(m + place, mask=inside, other=0.0)).to(tl.float64)
        tl.store(out + stack * rows + number, total, mask=number < rows)
    else:
        number = start // columns + own
        first = number * columns - start
        for place in range(tl.maximum(first, 0), tl.minimum(first + columns, n), BLOCK):
            places = place + tl.arange(0, BLOCK)
            inside = (places < first + columns) & (places < n)
            total += tl.abs(tl.load(m + places, mask=inside, other=0.0)).to(tl.float64)
        tl.store(out + number, folded(total, "sum"))


@_kernel
def gather_rows(table: tl.tensor, slices: tl.int32, out: tl.constexpr, turned: tl.constexpr) -> None:
    """g, of type ``out``, <- the elements of m, fp32, in chosen rows, one behind the other."""
    program = tl.program_id(0).to(tl.int64)
    row = row_of(table, slices, program, _WIDTH)
    base = (program - tl.load(row)) * BLOCK
    mask = tiles.inside(base, tl.load(row + 1))
    chosen, place = _chosen(row, base, mask, turned)
    x = tl.load(tiles.at(tl.load(row + 10), tl.float32, base) + tl.arange(0, BLOCK), mask=chosen, other=0.0)
    tiles.store_nearest_at(tiles.at(tl.load(row + 11), out, place), x, chosen)


@_kernel
def step_rows(
    table: tl.tensor,
    slices: tl.int32,
    weights: tl.constexpr,
    change: tl.constexpr,
    turned: tl.constexpr,
    cautious: tl.constexpr,
) -> None:
    """p <- factor p, in chosen rows p <- factor p - rate g and m <- kept m. weights, change: types of p and g."""
    program = tl.program_id(0).to(tl.int64)
    row = row_of(table, slices, program, _WIDTH)
    block = program - tl.load(row)
    base = block * BLOCK - tl.load(row + 2)
    mask = tiles.inside(base, tl.load(row + 1))
    chosen, place = _chosen(row, base, mask, turned)
    p_at = tiles.at(tl.load(row + 9), weights, base)
    p = tiles.load(p_at, None, mask)
    m_at = tiles.at(tl.load(row + 10), tl.float32, base) + tl.arange(0, BLOCK)
    m = tl.load(m_at, mask=chosen, other=0.0)
    g = tiles.widened(tl.load(tiles.at(tl.load(row + 11), change, place), mask=chosen, other=0))
    new_p = p * _number(row, 1) - g * _number(row, 0)
    if cautious:
        new_p = decayed(p, new_p, _number(row, 3))
    tl.store(m_at, m * _number(row, 2), mask=chosen)
    tiles.store(p_at, None, new_p, mask, tl.load(row + 12), tl.load(row + 14), tl.load(row + 13) + block * LANES)
