"""Runs of elements of a checkpoint in the dtype they are to have."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import decode
from ds_optim.elementwise.quantized import quantize, recut
from ds_optim.matrix.views import row_range
from ds_optim.optimizers.rules import MOMENTUM, SCALES_OF_MOMENTUM
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.lines import blocks_of
from ds_optim.zero.checkpoints.portable import MASTER, Portable


def dtype_of(portable: Portable, name: str, key: str) -> torch.dtype:
    """What a buffer is to be stored in."""
    stored = portable.shards.first(name)[key].dtype
    return portable.stored_as.get(name, stored) if key == MOMENTUM else stored


def values(portable: Portable, name: str, key: str, start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) as numbers: int8 codes decoded, others as they are stored."""
    stored = portable.shards.read(name, key, start, numel)
    if key == MOMENTUM and portable.scaled(name):
        return decode(stored, portable.shards.read_scales(name, start, numel))
    return stored


def piece(portable: Portable, name: str, key: str, start: int, numel: int) -> tuple[Tensor, Tensor | None]:
    """The same as they are to be stored, and the scales of the blocks that they touch, where those are int8 codes."""
    wanted = dtype_of(portable, name, key)
    if wanted != torch.int8:
        return values(portable, name, key, start, numel).to(wanted), None
    if portable.scaled(name):
        codes = portable.shards.read(name, key, start, numel)
        return recut(codes, portable.shards.read_scales(name, start, numel), start)
    return quantize(values(portable, name, key, start, numel).float(), start)


def flat_state(portable: Portable, unit: Unit, rank: int) -> dict[str, Tensor]:
    """One rank's flat partition of a unit: masters, buffers, and the scales of int8 momentum; zeros between them.

    A buffer that a parameter lacks, which never had a gradient in a run without ZeRO, is zero.
    """
    blocks = blocks_of(unit, rank)
    flats: dict[str, Tensor] = {}
    for key in (MASTER, *dict.fromkeys(key for spec in unit.params for key in portable.buffers[spec.name])):
        owner = next(spec.name for spec in unit.params if key in (MASTER, *portable.buffers[spec.name]))
        dtype = dtype_of(portable, owner, key)  # of masters bfloat16 where DeepSpeed keeps them so
        flats[key] = torch.zeros(unit.partition_numel, dtype=dtype, device="cpu")
        if dtype == torch.int8:
            count = sum(count for _, count in blocks.values())
            flats[SCALES_OF_MOMENTUM] = torch.zeros(count, dtype=torch.float32, device="cpu")
        for s in unit.slices(rank):
            name = unit.params[s.param].name
            if key not in (MASTER, *portable.buffers[name]):
                continue
            stored, scales = piece(portable, name, key, s.start, s.numel)
            flats[key][s.offset : s.offset + s.numel] = stored
            if scales is not None:
                first, count = blocks[s.param]
                flats[SCALES_OF_MOMENTUM][first : first + count] = scales
    return flats


def rows_held(portable: Portable, unit: Unit, rank: int) -> dict[str, dict[str, Tensor]]:
    """By key and parameter, what one rank keeps of the rows of its matrices."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, by_name in portable.rows.items():
        for held in unit.slices(rank):
            spec = unit.params[held.param]
            if spec.name in by_name:
                values = by_name[spec.name]
                first, last = row_range(spec.numel // len(values), held.start, held.numel)
                found.setdefault(key, {})[spec.name] = values[first:last].clone()
    return found


def whole_state(portable: Portable, unit: Unit, param: int) -> dict[str, Tensor]:
    """The same of one parameter where nothing is sharded, in its shape (scales apart)."""
    spec = unit.params[param]
    flats = {}
    for key in (MASTER, *portable.buffers[spec.name]):
        stored, scales = piece(portable, spec.name, key, 0, spec.numel)
        flats[key] = stored.clone().view(spec.shape)
        if scales is not None:
            flats[SCALES_OF_MOMENTUM] = scales
    return flats
