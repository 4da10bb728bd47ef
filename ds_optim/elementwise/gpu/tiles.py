"""A tile: the elements of one block of a parameter, of which some may lie outside of the slice and are masked.

What is stored in how many bits, the type of a pointer says: float32, int16 (the bits of a bfloat16), int8 (codes, with
a pointer to the scale of the block; without it whole numbers). Formulas and their roundings are those of ``momentum``
and ``noise``. Where the whole tile lies in the slice, and on multiples of 16 bytes, ``mask`` is None: a thread then
moves several elements at once. One warp does a tile, so that nothing in it waits for another.

Triton 3.5 takes numbers below 2^-126 for 0 in quotients and exact roots: scales above 2^126 and second moments that
small are then not those of the eager path. Later versions do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
LANES = tl.constexpr(32)
_ROUNDS = tl.constexpr(7)
_LEVELS = tl.constexpr(127.0)
_LARGEST_BF16 = tl.constexpr(0x7F7F0000)
_INFINITE = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SMALLEST_NORMAL = tl.constexpr(0x00800000)


@triton.jit
def inside(base: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Which elements of the tile that begins at ``base`` lie in the slice [0, n)."""
    low = tl.maximum(-base, 0).to(tl.int32)
    high = tl.minimum(n - base, BLOCK).to(tl.int32)
    offsets = tl.arange(0, BLOCK)
    return (offsets >= low) & (offsets < high)


@triton.jit
def load(values: tl.tensor, scale: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The tile's values in fp32, 0 outside of the slice."""
    offsets = tl.arange(0, BLOCK)
    if mask is None:
        raw = tl.load(tl.multiple_of(values + offsets, 16))
    else:
        raw = tl.load(values + offsets, mask=mask, other=0)
    if values.dtype.element_ty == tl.int16:
        return widened(raw)
    elif values.dtype.element_ty == tl.int8 and scale is not None:
        t = raw.to(tl.float32) * (1 / _LEVELS)
        return t * tl.abs(t) * tl.load(scale)
    else:
        return raw.to(tl.float32)


@triton.jit
def widened(raw: tl.tensor) -> tl.tensor:
    """Values as they are read, of any type but codes, in fp32."""
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def store(
    values: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    mask: tl.tensor,
    key: tl.tensor,
    step: tl.tensor,
    counter: tl.tensor,
) -> None:
    """Round fp32 values, which are 0 outside of the slice, as a :class:`momentum.Stored` does, and write them."""
    if values.dtype.element_ty == tl.int16:
        raw = _bfloat16(x, rounding_bits(key, step, counter))
    elif values.dtype.element_ty == tl.int8:
        largest = _largest(x)
        tl.store(scale, largest)
        raw = _encode(x, largest, rounding_bits(key, step, counter))
    else:
        raw = x
    _write(values, raw, mask)


@triton.jit
def store_nearest(values: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Round fp32 values to the nearest, ties to even, and write them."""
    _write(values, _nearest(values, x), mask)


@triton.jit
def store_nearest_at(places: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """The same, each value to a place of its own."""
    tl.store(places, _nearest(places, x), mask=mask)


@triton.jit
def _nearest(values: tl.tensor, x: tl.tensor) -> tl.tensor:
    if values.dtype.element_ty == tl.int16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.int16)
    else:
        return x.to(values.dtype.element_ty)


@triton.jit
def rounding_bits(key: tl.tensor, step: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """``noise.rounding_bits`` of a block: key is seed + 2^32 (the stream's number), counter the block's first."""
    step = step.to(tl.int64)
    counters = counter.to(tl.int64) + tl.arange(0, LANES)
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, step.to(tl.uint32), (step >> 32).to(tl.uint32), low, high, n_rounds=_ROUNDS)
    # (counter, half of a word, last bit and first bit of the word's number) -> (word, half, counter)
    words = tl.join(tl.join(_halves(a), _halves(b)), tl.join(_halves(c), _halves(d)))
    return tl.reshape(tl.permute(words, (3, 2, 1, 0)), [BLOCK])


@triton.jit
def uniform(key: tl.tensor, step: tl.tensor, first: tl.tensor) -> tl.tensor:
    """``noise.uniform_noise`` of a block whose first element is ``first``: key is seed + 2^32 stream."""
    element = first + tl.arange(0, BLOCK)
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    a, _, _, _ = tl.philox(key, step.to(tl.uint32), (step >> 32).to(tl.uint32), low, high, n_rounds=_ROUNDS)
    # (a + 1/2) / 2^31 - 1 is exact before it is rounded to fp32: a - 2^31 is a with its first bit turned over, signed.
    signed = (a ^ 0x80000000).to(tl.int32, bitcast=True)
    return (signed.to(tl.float64) + 0.5).to(tl.float32) * 4.656612873077393e-10


@triton.jit
def at(word: tl.tensor, dtype: tl.constexpr, place: tl.tensor) -> tl.tensor:
    """The element ``place`` behind an address."""
    return word.to(tl.pointer_type(dtype)) + place


@triton.jit
def _write(values: tl.tensor, raw: tl.tensor, mask: tl.tensor) -> None:
    offsets = tl.arange(0, BLOCK)
    if mask is None:
        tl.store(tl.multiple_of(values + offsets, 16), raw)
    else:
        tl.store(values + offsets, raw, mask=mask)


@triton.jit
def _halves(word: tl.tensor) -> tl.tensor:
    return tl.join((word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32))


@triton.jit
def _bfloat16(x: tl.tensor, noise: tl.tensor) -> tl.tensor:
    bits = x.to(tl.int32, bitcast=True)
    size = bits & _MAGNITUDE
    rounded = tl.minimum(tl.minimum(size, _LARGEST_BF16) + noise, _LARGEST_BF16)
    # A NaN that arithmetic made has the highest bit of its fraction set, and stays one when it is cut.
    rounded = tl.where(size < _INFINITE, rounded, size)
    return ((rounded | (bits ^ size)) >> 16).to(tl.int16)


@triton.jit
def _largest(x: tl.tensor) -> tl.tensor:
    """The block's scale. Numbers without a sign are ordered as their bits are, and NaN is above all."""
    most = tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE)
    return tl.where(most < _SMALLEST_NORMAL, 0, most).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x: tl.tensor, scale: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """``momentum.encode``, the root of y rounded down in a way that needs no exact root.

    k is the whole part or one less, and rest = y - k^2 is exact. The root rounded to fp32 may be whole where y is the
    last number below a square: the code is then the same, as the noise is always below what is left.
    """
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    y = tl.abs(x) * inverse * (_LEVELS * _LEVELS)
    k = tl.floor(tl.sqrt(y) * 0.99999)
    rest, width = y - k * k, k * 2.0 + 1.0
    beyond = rest - width
    more = beyond >= 0
    k, rest, width = tl.where(more, k + 1.0, k), tl.where(more, beyond, rest), tl.where(more, width + 2.0, width)
    k = tl.where((noise.to(tl.float32) + 0.5) * width < rest * 65536.0, k + 1.0, k)
    k = tl.where(k < _LEVELS, k, _LEVELS)
    code = tl.where(y == y, k, 0.0).to(tl.int8)
    return tl.where(x < 0, -code, code)
