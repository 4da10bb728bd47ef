"""int8 momentum whose blocks are cut anew.

A block that no border cuts keeps its codes and scale. Where a piece of a block comes together with its neighbour,
the larger scale is kept with all codes under it, and the other's values are rounded to the nearest code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_optim.elementwise.momentum import BLOCK, decode, encode, scales_numel

_TINY = torch.finfo(torch.float32).tiny
_HALF = 1 << 15  # of 16 random bits: what rounds to the nearer one


def recut(codes: Tensor, scales: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) and the scales of the blocks that the elements [start, start + n) of a parameter touch.

    scales: (n,), for each element the scale of the block that it was stored in.
    """
    padded, of_each = _in_blocks(codes, start), _in_blocks(scales, start)
    kept = of_each.amax(dim=1)
    again = encode(decode(padded, of_each), kept.unsqueeze(1), torch.full_like(padded, _HALF, dtype=torch.int32))
    new = torch.where(of_each == kept.unsqueeze(1), padded, again.to(torch.int8))
    return _out_of_blocks(new, start, codes.numel()), kept


def quantize(values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Values (n,) in fp32 rounded to the nearest codes, and their blocks' scales."""
    padded = _in_blocks(values, start)
    scales = padded.abs().amax(dim=1)
    scales = scales.masked_fill(scales < _TINY, 0.0)
    codes = encode(padded, scales.unsqueeze(1), torch.full_like(padded, _HALF, dtype=torch.int32))
    return _out_of_blocks(codes.to(torch.int8), start, values.numel()), scales


def largest_step(scales: Tensor) -> Tensor:
    """The widest distance of two neighbouring values that can be stored under each scale: 127 and 126."""
    return scales * (1 - (126 / 127) ** 2)


def _in_blocks(values: Tensor, start: int) -> Tensor:
    """(n,) -> (blocks, 256), zeros before and behind."""
    head, blocks = start % BLOCK, scales_numel(start, values.numel())
    return pad(values, (head, blocks * BLOCK - head - values.numel())).view(blocks, BLOCK)


def _out_of_blocks(blocks: Tensor, start: int, numel: int) -> Tensor:
    head = start % BLOCK
    return blocks.reshape(-1)[head : head + numel]
