"""Two kernels for all rules: one walks through the tiles of many slices, one joins what was measured.

A launch takes a table of slices. Each program finds its slice there and its tiles in the slice, reads them once,
computes in fp32 what the rule says, and writes them once. ``tiles`` says what pointers mean, ``rules`` the formulas.
A formula is compiled twice into one kernel, the two turns of its loop: without masks for tiles that lie whole in the
slice, and with them. A program takes one of the turns.
What differs from call to call stands in the table: dtypes and the rule alone compile a kernel anew.

Order of sums, in fp64: a lane adds up its elements of ``EACH`` blocks in their order, the 256 lanes are joined by
halves (i and i + 128, i and i + 64, ...), then in the same way the slice's parts, lane i those of i, i + 256, ...
Blocks are counted from the slice's first element, or in its parameter where momentum is rounded by blocks. So neither
the number of programs, nor alignment, nor other slices in the launch touch a bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ds_optim.elementwise.gpu import tiles
from ds_optim.elementwise.gpu.tiles import BLOCK, LANES

NAMES = (
    "first", "n", "head", "aligned", "key", "counter", "step_p", "step_m", "p", "m", "scale", "v", "g",
    "noise_key", "noise_step", "noise_start", "out",
)  # fmt: skip
"""first: programs of the slices before. key, counter: of ``tiles.rounding_bits``. out: where what was measured goes."""
WORDS, NUMBERS = len(NAMES), 10
"""Of a row of the table: integers, and fp64 numbers behind them, the last one the rate of cautious decay."""
WIDTH = WORDS + NUMBERS
EACH = 16
"""Blocks that a program measures: fewer take longer to join, with more a small slice has too few programs."""

_WORDS, _WIDTH = tl.constexpr(WORDS), tl.constexpr(WIDTH)


def _kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled for the types of its arguments alone, not for their values or alignment."""
    varying = [name for name in inspect.signature(function).parameters if name in ("table", "slices", "out")]
    return triton.jit(function, do_not_specialize=varying, do_not_specialize_on_alignment=varying)


@triton.jit
def _number(row: tl.tensor, k: tl.constexpr) -> tl.tensor:
    return tl.load(row + _WORDS + k).to(tl.float64, bitcast=True)


@triton.jit
def row_of(table: tl.tensor, slices: tl.tensor, program: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """The last row, of ``width`` words, whose slice begins no later than with this program."""
    low, high = slices * 0, slices
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * width) <= program
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return table + low.to(tl.int64) * width


@triton.jit
def _joined(a: tl.tensor, b: tl.tensor, join: tl.constexpr) -> tl.tensor:
    """NaN where either is."""
    if join == "sum":
        return a + b
    elif join == "min":
        return _smaller(a, b)
    else:
        return _larger(a, b)


@triton.jit
def _smaller(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.where((a <= b) | (a != a), a, b)


@triton.jit
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit
def folded(x: tl.tensor, join: tl.constexpr) -> tl.tensor:
    """The lanes joined by halves; the order of the others does not matter."""
    if join == "sum":
        for k in tl.static_range(7):
            x = tl.sum(tl.reshape(x, [2, 128 >> k]), 0)
        return tl.sum(x, 0)
    elif join == "min":
        return tl.reduce(x, 0, _smaller)
    else:
        return tl.reduce(x, 0, _larger)


@triton.jit
def decayed(old: tl.tensor, new: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """``fused.cautiously``."""
    stays = ((old - new) * old >= 0).to(tl.float32)
    return new - old * rate * stays


@triton.jit
def _measured(
    so_far: tl.tensor, x: tl.tensor, mask: tl.tensor, join: tl.constexpr, identity: tl.constexpr
) -> tl.tensor:
    """``x`` of the elements of the slice joined to each lane."""
    if mask is not None:
        x = tl.where(mask, x, identity)
    return _joined(so_far, x, join)


@triton.jit
def _tile(
    row: tl.tensor,
    block: tl.tensor,
    one: tl.tensor,
    two: tl.tensor,
    rule: tl.constexpr,
    types: tl.constexpr,
    writes: tl.constexpr,
    nearest: tl.constexpr,
    noisy: tl.constexpr,
    cautious: tl.constexpr,
    columns: tl.constexpr,
    join: tl.constexpr,
    identity: tl.constexpr,
) -> tl.tuple:
    """Take ``rule`` with a tile of the slice in this row; the two columns with what it measured joined to each lane."""
    n, head = tl.load(row + 1), tl.load(row + 2)
    base = block * BLOCK - head
    whole = (tl.load(row + 3) != 0) & (base >= 0) & (base + BLOCK <= n)
    turn = 1 - whole.to(tl.int32)
    d = (
        _number(row, 0), _number(row, 1), _number(row, 2), _number(row, 3), _number(row, 4), _number(row, 5),
        _number(row, 6), _number(row, 7), _number(row, 8), _number(row, 9),
    )  # fmt: skip
    w = (
        d[0].to(tl.float32), d[1].to(tl.float32), d[2].to(tl.float32), d[3].to(tl.float32), d[4].to(tl.float32),
        d[5].to(tl.float32), d[6].to(tl.float32), d[7].to(tl.float32), d[8].to(tl.float32), d[9].to(tl.float32),
    )  # fmt: skip
    for masked in tl.static_range(2):
        if turn == masked:
            mask, p, m, v, g, noise, scale = None, None, None, None, None, None, None
            if masked:
                mask = tiles.inside(base, n)
            if types[0] is not None:
                p_at = tiles.at(tl.load(row + 8), types[0], base)
                p = tiles.load(p_at, None, mask)
            if types[1] is not None:
                m_at = tiles.at(tl.load(row + 9), types[1], base)
                if types[1] == tl.int8:
                    scale = tiles.at(tl.load(row + 10), tl.float32, block)
                m = tiles.load(m_at, scale, mask)
            if types[2] is not None:
                v_at = tiles.at(tl.load(row + 11), types[2], base)
                v = tiles.load(v_at, None, mask)
            if types[3] is not None:
                g = tiles.load(tiles.at(tl.load(row + 12), types[3], base), None, mask)
            if noisy:
                noise = tiles.uniform(tl.load(row + 13), tl.load(row + 14), tl.load(row + 15) + base)
            new_p, new_m, new_v, a, b = rule(p, m, v, g, noise, w, d)
            if cautious:
                new_p = decayed(p, new_p, w[9])
            key, counter = tl.load(row + 4), tl.load(row + 5) + block * LANES
            if writes[1]:
                tiles.store(m_at, scale, new_m, mask, key, tl.load(row + 7), counter)
            if writes[2]:
                tiles.store_nearest(v_at, new_v, mask)
            if writes[0]:
                if nearest:
                    tiles.store_nearest(p_at, new_p, mask)
                else:
                    tiles.store(p_at, None, new_p, mask, key, tl.load(row + 6), counter)
            if columns > 0:
                one = _measured(one, a, mask, join, identity)
            if columns > 1:
                two = _measured(two, b, mask, join, identity)
    return one, two


@_kernel
def run(
    table: tl.tensor,
    slices: tl.int32,
    out: tl.tensor,
    rule: tl.constexpr,
    types: tl.constexpr,
    writes: tl.constexpr,
    nearest: tl.constexpr,
    noisy: tl.constexpr,
    cautious: tl.constexpr,
    columns: tl.constexpr,
    join: tl.constexpr,
    identity: tl.constexpr,
    each: tl.constexpr,
) -> None:
    """Take ``rule`` with the slices of the table, ``each`` tiles a program if it measures, else one.

    out: (programs, columns), what each measured. types: of what p, m, v and g point to, None for none; writes: whether
    p, m and v are written; nearest: p is rounded to the nearest.
    """
    program = tl.program_id(0).to(tl.int64)
    row = row_of(table, slices, program, _WIDTH)
    begin = (program - tl.load(row)) * each
    one = tl.full([BLOCK], identity, tl.float64)
    two = tl.full([BLOCK], identity, tl.float64)
    if columns == 0:
        _tile(row, begin, one, two, rule, types, writes, nearest, noisy, cautious, columns, join, identity)
    else:
        end = tl.minimum(begin + each, (tl.load(row + 2) + tl.load(row + 1) + BLOCK - 1) // BLOCK)
        for block in range(begin, end):
            one, two = _tile(
                row, block, one, two, rule, types, writes, nearest, noisy, cautious, columns, join, identity
            )
        tl.store(out + program * columns, folded(one, join))
        if columns > 1:
            tl.store(out + program * columns + 1, folded(two, join))


@_kernel
def join_parts(
    table: tl.tensor, out: tl.tensor, columns: tl.constexpr, join: tl.constexpr, identity: tl.constexpr
) -> None:
    """Join what the programs of each slice measured: out (programs, columns) -> ``columns`` numbers where its row says.

    The table has one row more, that begins behind the last program.
    """
    row = table + tl.program_id(0).to(tl.int64) * _WIDTH
    first, behind = tl.load(row), tl.load(row + _WIDTH)
    for column in tl.static_range(columns):
        numbers = tl.full([BLOCK], identity, tl.float64)
        for place in range(first, behind, BLOCK):
            places = place + tl.arange(0, BLOCK)
            part = tl.load(out + places * columns + column, mask=places < behind, other=identity)
            numbers = _joined(numbers, part, join)
        tl.store(tiles.at(tl.load(row + 16), tl.float64, column), folded(numbers, join))
