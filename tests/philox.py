"""Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), in NumPy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int], rounds: int = 7) -> NDArray[np.uint32]:
    """Scramble each 4-word counter under a 2-word key.

    counter: (n, 4) words, the least significant first. Returns (n, 4) random words. Seven rounds, unless said, are the
    least that pass BigCrush (their table 2).
    """
    c0, c1, c2, c3 = np.asarray(counter, dtype=np.uint64).T
    k0, k1 = key
    for _ in range(rounds):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> WORD_BITS) ^ c1 ^ np.uint64(k0),
            second & LOW_WORD,
            (first >> WORD_BITS) ^ c3 ^ np.uint64(k1),
            first & LOW_WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform_noise(seed: int, name_crc: int, step: int, numel: int) -> NDArray[np.float64]:
    """One number in (-1, 1) for each element of a parameter: (numel,).

    Key (seed, crc32 of the name); counter (step, element), 64 bits each, step in the low two words. The first
    of the four words is used. Ours: the spec fixes the generator, not how a word becomes a number; the half
    keeps the interval open and symmetric about zero.
    """
    element = np.arange(numel, dtype=np.uint64)
    low_high_step = np.full(numel, step & 0xFFFFFFFF, np.uint64), np.full(numel, step >> 32, np.uint64)
    counter = np.stack([*low_high_step, element & LOW_WORD, element >> WORD_BITS], axis=1)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, name_crc & 0xFFFFFFFF))
    return (words[:, 0].astype(np.float64) + 0.5) / 2.0**31 - 1.0
