"""What fits: the largest micro-batch on an accelerator of a given size, and the fewest accelerators."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable

from ds_optim.errors import UserError
from ds_optim.memory.passes import NOTHING, Passes
from ds_optim.memory.rank import RankMemory

#: What tensors may take of an accelerator: the rest is its context, NCCL, and what an allocator keeps in pieces.
USABLE = 0.9
#: Numbers of ranks that are tried: up to one node of eight each, then whole nodes.
RANKS = (*range(1, 9), *range(16, 129, 8), *range(160, 513, 32), *range(576, 1025, 64))
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>(?:[kmgt]i?)?b|[kmgt]i?|)\s*", re.IGNORECASE | re.ASCII)
_LARGEST_BATCH = 1 << 20


def parse_size(text: str) -> int:
    """Bytes of a size such as "80GiB" or "80GB"; raises ``UserError`` for what is none."""
    found = _SIZE.fullmatch(text)
    if found is None or not 0 < (number := float(found["number"])) < math.inf:
        raise UserError(f"{text!r} is no size of memory: write a number and its unit, such as 80GiB")
    if not found["unit"]:
        raise UserError(f"{text!r} has no unit: write {text.strip()}GiB or {text.strip()}GB")
    return int(number * _UNITS[found["unit"].lower().removesuffix("b")])


def fits(memory: RankMemory, size: int, passes: Passes = NOTHING) -> bool:
    """Whether a rank's peak, and what that may be short by, leaves the reserve of ``size`` bytes alone."""
    return memory.peak(passes) + passes.short <= size * USABLE


def largest_micro_batch(memory: RankMemory, size: int, passes_of: Callable[[int], Passes]) -> int:
    """The most sequences that a rank can take at once; 0 where not one fits.

    Args:
        passes_of: those of so many sequences, of which each needs memory.
    """
    if passes_of(1).most < 1:
        raise ValueError("a sequence has activations: give their bytes")
    if not fits(memory, size, passes_of(1)):
        return 0
    low, high = 1, _LARGEST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(memory, size, passes_of(middle)) else (low, middle - 1)
    return low


def fewest_ranks(memory_at: Callable[[int], RankMemory], size: int, passes: Passes = NOTHING) -> int | None:
    """The smallest of ``RANKS`` at which a rank's share fits; None if none of them is enough.

    Found by halving: of a share that more ranks make larger, by padding, it may miss the smallest by one.
    """
    found = bisect_left(RANKS, True, key=lambda ranks: fits(memory_at(ranks), size, passes))
    return RANKS[found] if found < len(RANKS) else None
