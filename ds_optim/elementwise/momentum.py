"""Momentum in 16 or 8 bits, weights in 16: read into a chunk of scratch, moved on there, rounded back without a bias.

Rounding is stochastic: a value between two that can be stored becomes either, with the probabilities that
keep its mean. Increments below half a step are then not lost: they arrive one time in so many. The random bits are
a function of (seed, step, parameter, element) alone (see ``noise``), in a stream of their own for momentum and one for
weights.

bfloat16: 2 bytes a value. int8: a code q of one byte, and for each block of 256 elements of a parameter the largest
|m| in it, s, in fp32: 1.0156 bytes a value; m = s (q/127) |q/127|, so that small values keep more digits than large
ones. Blocks are counted from the parameter's first element; a border that cuts one leaves two, each with its own s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_optim.elementwise.noise import NoiseKey, rounding_bits

BLOCK = 256
LEVELS = 127
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
NARROW = (torch.bfloat16, torch.int8)
"""What nothing is computed in: values of these dtypes are brought to fp32 first."""
WEIGHTS = 1 << 63
"""Added to the step in the rounding of weights: no step of training gets there, so no number is momentum's too."""
_LARGEST_BF16, _INFINITE = 0x7F7F0000, 0x7F800000
_MAGNITUDE, _SIGN, _KEPT = 0x7FFFFFFF, -0x80000000, -0x10000
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Stored(ABC):
    """A slice of weights, gradient or momentum that is not in the dtype of computation.

    writable: whether what a chunk becomes is stored; a pass that only measures must not round.
    """

    rounding: NoiseKey
    writable: bool = True

    @property
    @abstractmethod
    def data(self) -> Tensor:
        """The stored values, (n,)."""

    @abstractmethod
    def load(self, position: int, out: Tensor) -> None:
        """Fill ``out`` (k,) with the values at [position, position + k)."""

    @abstractmethod
    def store(self, position: int, values: Tensor) -> None:
        """Round ``values`` (k,) to [position, position + k); they are spent."""

    def first_chunk(self, step: int) -> int:
        """Elements of the first chunk where all following ones have ``step``: no block is cut by a chunk."""
        return step - self.rounding.start % BLOCK

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values in work."""
        return torch.float32

    def dim(self) -> int:
        return self.data.dim()

    def numel(self) -> int:
        return self.data.numel()


Flat = Tensor | Stored
"""Values (n,) in the dtype of computation, or stored in fewer bits."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are computed with."""
    return torch.float32 if dtype in NARROW else dtype


@dataclass(frozen=True, kw_only=True)
class Bfloat16(Stored):
    """values: (n,) of bfloat16."""

    values: Tensor

    @property
    def data(self) -> Tensor:
        return self.values

    def load(self, position: int, out: Tensor) -> None:
        out.copy_(self.values[position : position + out.numel()])

    def store(self, position: int, values: Tensor) -> None:
        bits = values.view(torch.int32)
        sign, odd = bits & _SIGN, (bits & _MAGNITUDE) >= _INFINITE
        noise = rounding_bits(bits, self.rounding.at(position))
        # What lies between two values of bfloat16 is the low half of an fp32: add up to one step, and cut. The largest
        # finite value stays what it is, and so do infinities and NaN: nothing that went wrong is to look sound.
        magnitude = (bits & _MAGNITUDE).clamp_(max=_LARGEST_BF16).add_(noise).clamp_(max=_LARGEST_BF16)
        rounded = torch.where(odd, bits, (magnitude & _KEPT).bitwise_or_(sign))
        self.values[position : position + values.numel()].copy_(rounded.view(torch.float32))


@dataclass(frozen=True, kw_only=True)
class Int8(Stored):
    """codes: (n,) of int8; scales: one fp32 for each block that the slice touches, in order."""

    codes: Tensor
    scales: Tensor

    @property
    def data(self) -> Tensor:
        return self.codes

    def load(self, position: int, out: Tensor) -> None:
        scales, head, blocks = self._blocks(position, out.numel())
        padded = _in_blocks(self.codes[position : position + out.numel()], head, blocks)
        decoded = decode(padded, scales.unsqueeze(1))
        out.copy_(decoded.view(-1)[head : head + out.numel()])

    def store(self, position: int, values: Tensor) -> None:
        scales, head, blocks = self._blocks(position, values.numel())
        noise = rounding_bits(values, self.rounding.at(position))
        padded, bits = _in_blocks(values, head, blocks), _in_blocks(noise, head, blocks)
        largest = padded.abs().amax(dim=1)
        scales.copy_(largest.masked_fill_(largest < _TINY, 0.0))
        codes = encode(padded, scales.unsqueeze(1), bits)
        self.codes[position : position + values.numel()].copy_(codes.view(-1)[head : head + values.numel()])

    def _blocks(self, position: int, numel: int) -> tuple[Tensor, int, int]:
        """The scales of a chunk, how many elements of its first block lie before it, and how many blocks it touches."""
        first = self.rounding.start // BLOCK
        begin = self.rounding.start + position
        head = begin % BLOCK
        blocks = -(-(head + numel) // BLOCK)
        skipped = begin // BLOCK - first
        return self.scales[skipped : skipped + blocks], head, blocks


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """s t |t|, t = q / 127, in fp32; the quotient by way of a product, which is exact at 0 and at 127."""
    t = codes.float().mul_(1 / LEVELS)
    return t.mul_(t.abs()).mul_(scales)


def encode(values: Tensor, scales: Tensor, bits: Tensor) -> Tensor:
    """The codes of ``values`` under ``scales`` (not below any of them), as floats; ``bits``: 16 random ones for each.

    x = 127^2 |m| / s lies between k^2 and (k + 1)^2, which the codes k and k + 1 stand for: k + 1 is taken with
    probability (x - k^2) / (2 k + 1), so that the mean of what is stored is m.
    """
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    x = values.abs().mul_(inverse).mul_(LEVELS**2)
    # By way of fp64, which rounds as a processor's own root does: a vector library's may be a last bit off.
    k = x.double().sqrt_().float().floor_()
    above = x.sub_(k * k).mul_(2.0**16)
    k += ((bits.float() + 0.5).mul_(k * 2 + 1) < above).float()
    return k.clamp_(max=LEVELS).copysign_(values)


def scales_numel(start: int, numel: int) -> int:
    """Blocks that the elements [start, start + numel) of a parameter touch."""
    return -(-(start + numel) // BLOCK) - start // BLOCK if numel else 0


def read_only(values: Flat) -> Flat:
    """The same for a pass that measures and stores nothing."""
    return values if isinstance(values, Tensor) else replace(values, writable=False)


def _in_blocks(values: Tensor, head: int, blocks: int) -> Tensor:
    """(k,) -> (blocks, 256), with zeros before and behind."""
    padded = values.new_zeros(blocks * BLOCK)
    padded[head : head + values.numel()] = values
    return padded.view(blocks, BLOCK)
