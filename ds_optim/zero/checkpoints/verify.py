"""Holding a written checkpoint against the one it was made from, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.optimizers.rules import MOMENTUM
from ds_optim.zero.checkpoints.module import Module, common_entries
from ds_optim.zero.checkpoints.pieces import dtype_of, values
from ds_optim.zero.checkpoints.portable import MASTER, Portable
from ds_optim.zero.checkpoints.quantized import largest_step

_CHUNK = 1 << 24


def check_masters(portable: Portable) -> None:
    """Refuse a checkpoint whose master weights, cast down, are not the model's: its layout is another one.

    Raises:
        UserError: naming the parameter.
    """
    if portable.stage == 3:
        return
    module = portable.models[0]["module"]
    for spec in portable.specs:
        own = module[spec.name].reshape(-1)
        for start, numel in _chunks(spec.numel):
            master = portable.shards.read(spec.name, MASTER, start, numel).to(own.dtype)
            if not torch.equal(master.nan_to_num(), own[start : start + numel].nan_to_num()):
                raise UserError(
                    f"the master weights of {spec.name} in the checkpoint are not the model's: weights were changed in "
                    "place before it was saved, or its layout is not one that ds-optim knows"
                )


def differences(made: Portable, original: Portable) -> list[str]:
    """What of ``original`` is not in ``made``, by name; empty where all of it is.

    fp32 and bfloat16 are compared bit for bit, int8 momentum within a step of its quantization.
    """
    found = []
    for what, one, other in (
        ("groups", made.groups, original.groups),
        ("scalars", made.scalars, original.scalars),
        ("steps", _entries(made), _entries(original)),
        ("state", made.has_state, original.has_state),
        ("schedule and counts", _counts(made), _counts(original)),
    ):
        if _text(one) != _text(other):
            found.append(what)
    for spec in original.specs:
        keys = (MASTER, *original.buffers[spec.name])
        found += [f"{key} of {spec.name}" for key in keys if not _same(made, original, spec.name, key, spec.numel)]
    mine, theirs = Module(made).whole(), Module(original).whole()
    found += [f"weights of {n}" for n in theirs if n not in mine or not _identical(mine[n], theirs[n])]
    return found


def _text(content: object) -> str:
    """For comparing what may hold tensors, which do not compare to one answer."""
    return repr(sorted(content.items())) if isinstance(content, dict) else repr(content)


def _same(made: Portable, original: Portable, name: str, key: str, numel: int) -> bool:
    dtype = dtype_of(original, name, key)
    for start, count in _chunks(numel):
        one, other = values(made, name, key, start, count), values(original, name, key, start, count)
        if dtype == torch.int8 and key == MOMENTUM:
            step = largest_step(made.shards.read_scales(name, start, count))
            if not torch.all((one - other).abs() <= step):
                return False
        elif not _identical(one, other.to(dtype)):
            return False
    return True


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_CHUNK, numel - start)) for start in range(0, numel, _CHUNK))


def _identical(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _entries(portable: Portable) -> dict[str, dict[str, float]]:
    """By parameter; a count that its group's tensor raised is the group's."""
    highest: dict[str, float] = {}
    for entry in portable.entries.values():
        for key, value in entry.items():
            highest[key] = max(highest.get(key, -math.inf), float(value))
    return {name: highest for name in portable.entries}


def _counts(portable: Portable) -> dict[str, object]:
    model = common_entries(portable.models[0])
    return {key: model.get(key) for key in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")}
