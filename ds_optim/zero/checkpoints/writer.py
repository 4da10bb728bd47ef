"""From the columns of a checkpoint to the files that so many ranks at a stage would have saved, one rank at a time."""

from __future__ import annotations

import copy
import errno
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.machine.files import write_reason
from ds_optim.optimizers.experts import SHARED_BY
from ds_optim.optimizers.rules import RULES, SCALARS, STEP
from ds_optim.optimizers.saved import SAVED, with_placeholders
from ds_optim.sharding.layout import Layout
from ds_optim.zero.checkpoints.columns import is_of_experts
from ds_optim.zero.checkpoints.expert_columns import partition_groups
from ds_optim.zero.checkpoints.experts import LAYERS, UNIVERSAL, placed, single
from ds_optim.zero.checkpoints.folder import (
    LATEST,
    SCRIPTS,
    Stamps,
    expert_file,
    expert_optimizer_file,
    model_file,
    optimizer_file,
    stamped,
)
from ds_optim.zero.checkpoints.module import Module, common_entries
from ds_optim.zero.checkpoints.pieces import flat_state, rows_held, whole_state
from ds_optim.zero.checkpoints.portable import MASTER, Portable
from ds_optim.zero.checkpoints.states import as_saved
from ds_optim.zero.checkpoints.target import Target

State = dict[int, dict[str, Any]]


def write_checkpoint(
    columns: Sequence[Portable], target: Target, place: Path, tag: str, stamps: Stamps | None = None
) -> None:
    """Write ``place``/``tag``, and ``latest`` and DeepSpeed's own recovery scripts beside it.

    columns: all of the checkpoint. stamps: what each file is to say of itself.

    Raises:
        UserError: the checkpoint has what a run of this shape cannot have.
        OSError: it cannot be written.
    """
    folder = place / tag
    folder.mkdir(parents=True)
    layouts = [target.layout(portable) for portable in columns]
    for number, rank in _writers(columns, target.ranks if target.stage else 0, target):
        name = optimizer_file(rank, columns[number].prefix, columns[number].column.tensor)
        _save(_optimizer_states(columns[number], target, layouts[number], rank), folder / name, stamps)
    modules = [Module(portable) for portable in columns]
    for number, rank in _writers(columns, target.ranks if target.stage == 3 else 1, target):
        name = model_file(rank, target.stage, columns[number].column.tensor)
        _save(_model_states(columns[number], target, layouts[number], modules[number], rank), folder / name, stamps)
    for name, content in _expert_states(columns, target, layouts):
        _save(content, folder / name, stamps)
    (place / LATEST).write_text(tag, encoding="utf-8")
    if target.stage:
        _copy_scripts(place)


def _writers(columns: Sequence[Portable], ranks: int, target: Target) -> Iterator[tuple[int, int]]:
    """(column, data-parallel rank) of whoever writes a file, where each of so many ranks does."""
    for number, portable in enumerate(columns):
        own = portable.column.ranks(target.ranks) if portable.column.experts else range(ranks)
        yield from ((number, rank) for rank in own if rank < ranks)


def _expert_states(
    columns: Sequence[Portable], target: Target, layouts: Sequence[Layout]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the files of experts: their weights below stage 3, their ranks' optimizers at stage 0."""
    for portable, layout in zip(columns, layouts, strict=True):
        if not portable.column.experts or target.stage == 3:
            continue
        if target.stage == 0:
            yield expert_optimizer_file(portable.column.number), {"optimizer": _stage0(portable, layout, target)}
        if portable.stage == 3:
            yield from single(portable.models[0][LAYERS], portable.column, portable.weights)
        elif portable.experts is not None and portable.column.number == 0:  # each column knows all of them
            yield from ((expert_file(*place), dict(own)) for place, own in portable.experts.files.items())


def _save(content: Mapping[str, Any], path: Path, stamps: Stamps | None) -> None:
    try:
        torch.save(stamped(content, path.name, stamps), path)
    except RuntimeError as error:  # torch's own word for a disk that is full
        raise OSError(errno.EIO, write_reason(error, path.parent)) from error


def _copy_scripts(place: Path) -> None:
    from deepspeed.utils import zero_to_fp32

    for name in SCRIPTS:
        script = Path(zero_to_fp32.__file__).with_name(name)
        if script.is_file():
            shutil.copy(script, place / name)


def config_of(portable: Portable, target: Target) -> dict[str, Any]:
    """The JSON of the run that saved it, with the new shape."""
    config = copy.deepcopy(portable.config)
    zero = config.get("zero_optimization")
    config["zero_optimization"] = {**(zero if isinstance(zero, dict) else {}), **target.settings()}
    return config


# ------------------------------------------------------------------------------------------- optimizer files


def _optimizer_states(portable: Portable, target: Target, layout: Layout, rank: int) -> dict[str, Any]:
    places = [portable.sharing(unit, target.ranks).index(rank) for unit in layout.units]
    flats = [flat_state(portable, unit, place) for unit, place in zip(layout.units, places, strict=True)]
    state: State = {}
    numbers: list[list[int]] = [[] for _ in portable.groups]
    for number, unit in enumerate(layout.units):
        numbers[unit.group].append(number)
    for number, (unit, own) in enumerate(zip(layout.units, flats, strict=True)):
        if portable.has_state:
            names = [spec.name for spec in unit.params]
            state[number] = _tensor_state(portable, names, rows_held(portable, unit, places[number]), own)
            rule = portable.groups[unit.group].rule
            if rule is not None:
                state[number] = with_placeholders(state[number], RULES[rule], own[MASTER])
    build = _stage3 if target.stage == 3 else _stages_1_2
    base = {"state": state, "param_groups": _packed(portable, numbers, target)}
    states = build(portable, layout, places, [own[MASTER] for own in flats], base)
    if portable.column.experts and target.stage == 3:
        states["ds_zero_partition_groups"] = partition_groups(portable, layout, target.ranks, rank)
    config = config_of(portable, target)
    return {"optimizer_state_dict": states, "ds_config": config, "ds_version": portable.version}


def _packed(portable: Portable, numbers: Sequence[Sequence[int]], target: Target) -> list[dict[str, Any]]:
    """The groups as torch packs them, with the numbers of their tensors."""
    described = {} if portable.description is None else {SAVED: _described(portable, target)}
    return [
        {**group.hyper, "params": list(own), **described} for group, own in zip(portable.groups, numbers, strict=True)
    ]


def _described(portable: Portable, target: Target) -> dict[str, Any]:
    """The description, with the ranks that share experts."""
    assert portable.description is not None
    shared = {SHARED_BY: tuple(portable.column.ranks(target.ranks))} if target.stage else {}
    groups = [{**g, **(shared if is_of_experts(g) else {})} for g in portable.description["groups"]]
    return {**portable.description, "groups": groups}


def _tensor_state(
    portable: Portable, names: Sequence[str], rows: Mapping[str, Any], flats: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state of one tensor, which holds (slices of) these parameters; rows: what is kept of their rows."""
    state: dict[str, Any] = as_saved({key: value for key, value in flats.items() if key != MASTER}) | dict(rows)
    if any(name in portable.scalars for name in names):
        state[SCALARS] = {name: portable.scalars[name] for name in names}
    return state | _joined([portable.entries[name] for name in names])


def _joined(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One tensor's step count and such, of those that its parameters had."""
    found: dict[str, Any] = {}
    for entry in entries:
        for key, value in entry.items():
            known = found.setdefault(key, value)
            if float(known) == float(value):
                continue
            if key != STEP:
                raise UserError(f"the parameters of one group have different values of {key}: they cannot be joined")
            found[key] = max(known, value)  # one without a gradient had fewer steps
    return found


def _stages_1_2(
    portable: Portable, layout: Layout, places: Sequence[int], masters: Sequence[Tensor], base: dict[str, Any]
) -> dict[str, Any]:
    """places: this rank's among those that share each unit."""
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    paddings, lean, alignments, addresses = [], [], [], []
    for unit, master, rank in zip(layout.units, masters, places, strict=True):
        ends = unit.starts[-1] + unit.params[-1].numel
        padding = unit.world_size * unit.partition_numel - ends if rank == unit.world_size - 1 else 0
        paddings.append(padding)
        lean.append(master[: master.numel() - padding].clone())  # as DeepSpeed does, also where nothing is left
        starts = [*unit.starts, ends]
        alignments.append([starts[p + 1] - starts[p] - spec.numel for p, spec in enumerate(unit.params)])
        addresses.append(
            OrderedDict(
                (unit.params[s.param].name, fragment_address(numel=s.numel, start=s.offset)) for s in unit.slices(rank)
            )
        )
    return {
        **wrapper_of(portable),
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": lean,
        "zero_stage": ZeroStageEnum(layout.stage),
        "group_paddings": paddings,
        "param_alignment_paddings": alignments,
        "partition_count": [unit.world_size for unit in layout.units],
        "ds_version": portable.version,
        "param_slice_mappings": addresses,
    }


def _stage3(
    portable: Portable, layout: Layout, places: Sequence[int], masters: Sequence[Tensor], base: dict[str, Any]
) -> dict[str, Any]:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    wrapper = wrapper_of(portable)
    del wrapper["clip_grad"]
    return {
        "zero_stage": ZeroStageEnum(3),
        **wrapper,
        "partition_count": layout.world_size,
        "optimizer_state_dict": base,
        "fp32_flat_groups": list(masters),
    }


def wrapper_of(portable: Portable) -> dict[str, Any]:
    """Loss scale and such; a wrapper that keeps none of it saves the same as one whose scale is 1."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    clip = portable.config.get("gradient_clipping", 0.0)
    return {
        "loss_scaler": portable.wrapper.get("loss_scaler", LossScaler(scale=1.0)),
        "dynamic_loss_scale": portable.wrapper.get("dynamic_loss_scale", False),
        "overflow": portable.wrapper.get("overflow", False),
        "clip_grad": portable.wrapper.get("clip_grad", clip if isinstance(clip, float) else 0.0),
    }


# ----------------------------------------------------------------------------------------------- model files


def _model_states(portable: Portable, target: Target, layout: Layout, module: Module, rank: int) -> dict[str, Any]:
    states: dict[str, Any] = {
        "module": module.buffers_alone() if target.stage == 3 else module.whole(),
        "optimizer": None if target.stage else _stage0(portable, layout, target),
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
    }
    if target.stage:
        states["param_shapes"] = [
            OrderedDict((spec.name, torch.Size(spec.shape)) for spec in unit.params) for unit in layout.units
        ]
        states["shared_params"] = dict(module.shared) if rank == 0 else {}
    shapes = module.frozen_shapes
    if target.stage >= 2 and shapes:  # an empty list would say that none is frozen, where they were left out
        states["frozen_param_shapes"] = shapes
        states["frozen_param_fragments"] = OrderedDict(
            (name, module.frozen_slice(name, rank, target.ranks) if target.stage == 3 else module.frozen(name))
            for name in shapes
        )
    common = common_entries(portable, target.stage, target.ranks, rank)
    if LAYERS in portable.models[0]:
        common[LAYERS] = placed(portable.models[0][LAYERS], portable.column, rank, target.ranks, target.stage)
        if isinstance(common[LAYERS], list) and isinstance(common.get(UNIVERSAL), Mapping):
            common[UNIVERSAL] = {**common[UNIVERSAL], LAYERS: common[LAYERS]}
    return {**states, **common, "dp_world_size": target.ranks, "ds_config": config_of(portable, target)}


def _stage0(portable: Portable, layout: Layout, target: Target) -> dict[str, Any]:
    """The optimizer of a run without ZeRO: torch's own dict in fp32, that of DeepSpeed's wrapper in 16 bits."""
    state: State = {}
    masters: list[list[Tensor]] = [[] for _ in portable.groups]
    numbers: list[list[int]] = [[] for _ in portable.groups]
    for unit in layout.units:
        for param, spec in enumerate(unit.params):
            number = sum(map(len, numbers))
            flats = whole_state(portable, unit, param)
            masters[unit.group].append(flats[MASTER])
            numbers[unit.group].append(number)
            if portable.has_state and (portable.entries[spec.name] or portable.buffers[spec.name]):
                by_key = portable.rows.items()
                rows = {key: {spec.name: own[spec.name].clone()} for key, own in by_key if spec.name in own}
                state[number] = _tensor_state(portable, [spec.name], rows, flats)
    base = {"state": state, "param_groups": _packed(portable, numbers, target)}
    if portable.weights_dtype(portable.specs[0].name) == torch.float32:
        return base
    return {
        "dynamic_loss_scale": False,
        "cur_scale": 1.0,
        "cur_iter": portable.step,
        "optimizer_state_dict": base,
        "fp32_groups": masters,
    }
