"""Random numbers that are a function of what they are for: Philox4x32-7 (Salmon et al., SC 2011).

A counter-based generator has no state: the number of an element is the same on any rank, at any stage, in
any chunk, and after a resume. Integers round nothing, so every device agrees to the bit. Seven rounds are the least
that pass all of BigCrush (their table 2); ten, their margin, cost a step of 8-bit momentum 8 % of its time.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 7
_BLOCK = 256
# Seven rounds are seventy passes over 8-byte integers: worth staying in a CPU's second-level cache for.
_CPU_CHUNK = 1 << 14
# They hold 72 bytes a counter at once.
_CUDA_CHUNK = 1 << 20


def stream_of(name: str) -> int:
    """The number of a parameter's stream: 32 bits of its name."""
    return zlib.crc32(name.encode())


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """What the random numbers of a slice are a function of: ``start`` is its first element's place in its parameter."""

    seed: int
    stream: int
    step: int
    start: int

    def at(self, position: int) -> NoiseKey:
        """Of the element ``position`` places behind the first one."""
        return replace(self, start=self.start + position)


def uniform_noise(out: Tensor, key: NoiseKey) -> Tensor:
    """Fill ``out`` (n,) with numbers in [-1, 1] for the elements [start, start + n) of a parameter.

    Key (seed, stream), counter (step, element) of 64 bits each, the first of the four words w:
    (w + 0.5) / 2^31 - 1, computed in fp64 and rounded to ``out``'s dtype.
    """
    size = _counters(out)
    position = key.start
    for part in out.split(size):
        element = torch.arange(position, position + part.numel(), dtype=torch.int64, device=out.device)
        word = philox(element, key.step, (key.seed, key.stream))[0]
        part.copy_(word.double().add_(0.5).mul_(2.0**-31).sub_(1.0))
        position += part.numel()
    return out


def rounding_bits(like: Tensor, key: NoiseKey) -> Tensor:
    """16 random bits for each of the elements [start, start + n) of a parameter, int32 (n,), for rounding.

    A block of 256 elements takes the 32 counters (step, element // 256 * 32 + element % 32): first the low halves of
    their first words, then the high ones, and so on through the four words, so that neighbours are computed side by
    side. The stream is the parameter's, with every bit turned over, so that it is none of any rule's noise.
    """
    start, end = key.start, key.start + like.numel()
    words_key = key.seed, key.stream ^ _LOW
    out = torch.empty(like.numel(), dtype=torch.int32, device=like.device)
    size = _counters(like) * 8
    for first in range(start // _BLOCK * _BLOCK, end, size):
        last = min(first + size, -(-end // _BLOCK) * _BLOCK)
        words = philox(torch.arange(first // 8, last // 8, dtype=torch.int64, device=like.device), key.step, words_key)
        halves = [half.view(-1, _BLOCK // 8) for word in words for half in (word & 0xFFFF, word >> 16)]
        bits = torch.stack(halves, dim=1).view(-1)
        begin, stop = max(first, start), min(last, end)
        out[begin - start : stop - start] = bits[begin - first : stop - first]
    return out


def _counters(like: Tensor) -> int:
    """How many are worked on at once."""
    return _CPU_CHUNK if like.device.type == "cpu" else _CUDA_CHUNK


def uniform(*, seed: int, stream: int, step: int) -> float:
    """One number in (0, 1) that all ranks agree on without asking."""
    word = int(philox(torch.zeros(1, dtype=torch.int64, device="cpu"), step, (seed, stream))[0])
    return (word + 0.5) * 2.0**-32


def philox(element: Tensor, step: int, key: tuple[int, int]) -> list[Tensor]:
    """The four words of each counter (step, element): int64 (n,) -> four int64 (n,) in [0, 2^32)."""
    key = key[0] & _LOW, key[1] & _LOW
    counter = [torch.full_like(element, step & _LOW), torch.full_like(element, step >> 32 & _LOW)]
    counter += [element & _LOW, element >> 32 & _LOW]
    for round_ in range(_ROUNDS):
        if round_:
            key = (key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW
        # The product of two 32-bit words fills 64 bits: as int64 it wraps, and its bits are right all the same.
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> 32).bitwise_and_(_LOW).bitwise_xor_(counter[1]).bitwise_xor_(key[0]),
            second.bitwise_and_(_LOW),
            (first >> 32).bitwise_and_(_LOW).bitwise_xor_(counter[3]).bitwise_xor_(key[1]),
            first.bitwise_and_(_LOW),
        ]
    return counter
