"""Holding a written checkpoint against the one it was made from, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ds_optim.elementwise.quantized import largest_step
from ds_optim.errors import UserError
from ds_optim.optimizers.rules import MOMENTUM
from ds_optim.zero.checkpoints.columns import is_of_experts
from ds_optim.zero.checkpoints.module import Module, common_entries
from ds_optim.zero.checkpoints.pieces import dtype_of, values
from ds_optim.zero.checkpoints.portable import MASTER, Portable
from ds_optim.zero.checkpoints.same import identical, same
from ds_optim.zero.checkpoints.target import Target
from ds_optim.zero.checkpoints.writer import config_of, wrapper_of

_CHUNK = 1 << 24


def check_masters(portable: Portable) -> None:
    """Refuse a checkpoint whose master weights, cast down, are not the model's: its layout is another one.

    Raises:
        UserError: naming the parameter.
    """
    if portable.stage == 3:
        return
    found = unlike_masters(portable)
    if found is not None:
        raise UserError(
            f"the master weights of {found} in the checkpoint are not the model's: weights were changed in "
            "place before it was saved, or its layout is not one that ds-optim knows"
        )


def unlike_masters(portable: Portable) -> str | None:
    """The first parameter whose master weights, cast down, are not its weights in the files of stages 0 to 2."""
    for spec in portable.specs:
        weights = portable.saved_weights(spec.name)
        if weights is None:  # left out as frozen
            continue
        own = weights.reshape(-1)
        for start, numel in _chunks(spec.numel):
            master = portable.shards.read(spec.name, MASTER, start, numel).to(own.dtype)
            if not torch.equal(master.nan_to_num(), own[start : start + numel].nan_to_num()):
                return spec.name
    return None


def differences(made: Portable, original: Portable, target: Target) -> list[str]:
    """What a load of ``made`` would not get as one of ``original`` does, by name; empty where it gets everything.

    fp32 and bfloat16 are compared bit for bit, int8 momentum within a step of its quantization.
    """
    found = [
        what
        for what, one, other in (
            ("groups", made.groups, original.groups),
            ("description", made.description, original.description),
            ("scalars", made.scalars, original.scalars),
            ("rows", made.rows, original.rows),
            ("steps", _entries(made), _entries(original)),
            ("state", made.has_state, original.has_state),
            ("settings", made.config, config_of(original, target)),
            ("loss scale", made.wrapper, {key: wrapper_of(original).get(key) for key in made.wrapper}),
        )
        if not same(one, other)
    ]
    for spec in original.specs:
        keys = (MASTER, *original.buffers[spec.name])
        found += [f"{key} of {spec.name}" for key in keys if not _same(made, original, spec.name, key, spec.numel)]
    if made.column.experts and made.stage < 3:
        wrong = set(made.experts.names if made.experts is not None else ()) ^ set(_of_experts(original))
        found += [f"weights of {name}" for name in (*sorted(wrong), unlike_masters(made)) if name is not None]
    module = Module(original)
    for rank in range(len(made.models)):
        found += _missing(made, module, original, target, rank)
    return found


def _of_experts(portable: Portable) -> list[str]:
    return [spec.name for group in portable.groups if is_of_experts(group.hyper) for spec in group.params]


def _missing(made: Portable, module: Module, original: Portable, target: Target, rank: int) -> Iterator[str]:
    """What is not in one model file as ``engine.load_checkpoint`` asks for it.

    It puts all of "module" into the model, and then, unless there are none, a frozen fragment into every parameter
    that is frozen; the rest goes to the schedule, the engine's counts and the client.
    """
    model = made.models[rank]
    wanted = module.buffers_alone() if target.stage == 3 else module.whole()
    for name in dict.fromkeys([*wanted, *model["module"]]):
        if name not in wanted or name not in model["module"] or not same(model["module"][name], wanted[name]):
            yield f"weights of {name}"
    fragments = model.get("frozen_param_fragments")
    frozen = module.frozen_shapes if target.stage >= 2 else {}
    listed = {} if fragments is None else fragments
    if listed.keys() != frozen.keys() or (fragments is None) != (not frozen):
        yield "the list of frozen parameters"
    for name in listed.keys() & frozen.keys():
        part = module.frozen_slice(name, rank, target.ranks) if target.stage == 3 else module.frozen(name)
        if not same(listed[name], part):
            yield f"frozen {name}"
    one, other = (common_entries(own, target.stage, target.ranks, rank) for own in (made, original))
    yield from (key for key in {**one, **other} if key not in one or key not in other or not same(one[key], other[key]))


def _same(made: Portable, original: Portable, name: str, key: str, numel: int) -> bool:
    dtype = dtype_of(original, name, key)
    for start, count in _chunks(numel):
        one, other = values(made, name, key, start, count), values(original, name, key, start, count)
        if dtype == torch.int8 and key == MOMENTUM:
            step = largest_step(made.shards.read_scales(name, start, count))
            if not torch.all((one - other).abs() <= step):
                return False
        elif not identical(one, other.to(dtype)):
            return False
    return True


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_CHUNK, numel - start)) for start in range(0, numel, _CHUNK))


def _entries(portable: Portable) -> dict[str, dict[str, float]]:
    """By parameter; a count that its group's tensor raised is the group's."""
    highest: dict[str, float] = {}
    for entry in portable.entries.values():
        for key, value in entry.items():
            highest[key] = max(highest.get(key, -math.inf), float(value))
    return {name: highest for name in portable.entries}
