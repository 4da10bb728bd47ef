"""From the files of an ordinary DeepSpeed checkpoint, ZeRO stage 0 to 3, to a :class:`Portable`, or one a column.

The closed form of the layout is held against what the files say of it: the addresses at stages 1 and 2, the sizes
at stage 3. What does not fit is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.optimizers.rules import SCALES_OF_MOMENTUM
from ds_optim.optimizers.saved import without_description
from ds_optim.sharding.layout import Layout, ParamSpec, Unit, build_layout, has_padding, undealt
from ds_optim.sharding.lines import blocks_of
from ds_optim.zero.checkpoints.columns import WRONG, Column, experts_over
from ds_optim.zero.checkpoints.described import described
from ds_optim.zero.checkpoints.expert_columns import columns_of_experts, of_experts, read_columns_at_stage0
from ds_optim.zero.checkpoints.experts import read_experts
from ds_optim.zero.checkpoints.folder import Files, find_files, find_folder
from ds_optim.zero.checkpoints.portable import MASTER, Flats, Portable
from ds_optim.zero.checkpoints.safe import laid_out, load
from ds_optim.zero.checkpoints.stage0 import Names, is_bf16
from ds_optim.zero.checkpoints.states import Saved, numbered
from ds_optim.zero.refused import is_true

_OPTIMIZER, _BASE = "optimizer_state_dict", "base_optimizer_state"
_COUNTS = ("dp_world_size", "mp_world_size", "global_steps", "skipped_steps")
"""What a load takes from a model file besides the model and the optimizer."""
_WRAPPER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
_Base = tuple[dict[int, dict[str, Any]], list[dict[str, Any]], Any]


def open_checkpoint(source: Path, names: Names | None = None, *, state: bool = True) -> Portable:
    """The checkpoint in ``source``: a tag's folder, or the folder above it whose ``latest`` names the tag.

    names: of each group's parameters, for checkpoints of stage 0 that do not tell. state: False leaves the
    optimizer's state aside, of whatever kind it is.

    Raises:
        UserError: it is damaged, not whole, or of a kind that cannot be taken apart; or it has more than one column.
    """
    columns = open_columns(source, names, state=state)
    if len(columns) > 1:
        raise UserError(
            f"{source} has {len(columns)} columns of ranks with parameters of their own: open_columns has them"
        )
    return columns[0]


def open_columns(source: Path, names: Names | None = None, *, state: bool = True) -> list[Portable]:
    """The same of a checkpoint whose tensor-parallel ranks hold shards, or whose ranks hold different experts."""
    folder = find_folder(source)
    found: list[Portable] = []
    by_rank = find_files(folder)
    with laid_out(folder):
        for number, files in enumerate(by_rank):
            found += _open(files, Column(number=number, count=len(by_rank)), names, state)
        return [described(portable, folder) for portable in found]


def _open(files: Files, column: Column, names: Names | None, state: bool) -> list[Portable]:
    models = [load(path) for path in files.models]
    for path, model in zip(files.models, models, strict=True):
        if not isinstance(model, Mapping) or not isinstance(model.get("module"), dict):
            raise UserError(f"{path} is no file of a DeepSpeed checkpoint with its model in it")
        missing = [key for key in _COUNTS if type(model.get(key)) is not int or model[key] < 0]
        if missing:
            raise UserError(f"{path} is damaged: {missing[0]} in it is {model.get(missing[0])!r}")
    ranks = int(models[0]["dp_world_size"])
    if not files.optimizers:
        prefix = "bf16_" if is_bf16(models[0]) else ""
        return [
            found.portable(files, models, prefix)
            for found in read_columns_at_stage0(files, column, models[0], names, state)
        ]
    if len(files.optimizers) != ranks:
        raise UserError(
            f"{files.folder} was saved by {ranks} ranks and holds {len(files.optimizers)} optimizer files: "
            "the checkpoint is not whole"
        )
    saved = [_optimizer_of(path, state) for path in files.optimizers]
    stage = int(saved[0].get("zero_stage", 1))  # BF16_Optimizer, which is stage 1, does not say
    base = [_base_of(sd.get(_OPTIMIZER if stage == 3 else _BASE), files, rank) for rank, sd in enumerate(saved)]
    count = experts_over(base[0][1], files.folder)
    columns = [column] if count is None else columns_of_experts(files, models[0], count, ranks)
    return [
        _read_sharded(files, models[0], saved, base, stage, own).portable(files, models, files.prefix)
        for own in columns
    ]


def _optimizer_of(path: Path, state: bool) -> dict[str, Any]:
    loaded = load(path)
    found = loaded.get(_OPTIMIZER) if isinstance(loaded, Mapping) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no state of a ZeRO optimizer")
    for key in () if state else (_BASE, _OPTIMIZER):
        if isinstance(found.get(key), Mapping):
            found[key] = {**found[key], "state": {}}
    return found


def _zero_section(config: Any, folder: Path) -> Mapping[str, Any]:
    """The saved run's settings of ZeRO; raises for one that puts state at borders that are not known."""
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {}
    section: Mapping[str, Any] = zero if isinstance(zero, Mapping) else {}
    if section.get("elastic_checkpoint") is True:
        raise UserError(f"{folder} was saved with elastic_checkpoint, which puts parameters at other places")
    return section


def _read_sharded(
    files: Files,
    model: Mapping[str, Any],
    saved: Sequence[dict[str, Any]],
    base: Sequence[_Base],
    stage: int,
    column: Column,
) -> Saved:
    """Stages 1 and 2, and ``BF16_Optimizer``: a flat partition for each group; stage 3: for each sub-group of it."""
    section = _zero_section(model.get("ds_config"), files.folder)
    specs = _specs(model, files)
    state, groups, description = base[column.ranks(len(saved))[0] if column.experts else 0]
    sharing = [column.sharing(group, len(saved)) for group in groups]
    if stage == 3:
        layout, masters = _layout_of_sub_groups(specs, saved, groups, sharing, files), "fp32_flat_groups"
    else:
        # BF16_Optimizer deals nothing.
        robin = "zero_stage" in saved[0] and is_true(section.get("round_robin_gradients"))
        if robin:  # the files name parameters in the order of memory
            specs = [undealt(group, len(own)) for group, own in zip(specs, sharing, strict=True)]
        layout, masters = _flat_layout(specs, saved, stage, files, robin, sharing), "single_partition_of_fp32_groups"
    flats, states = [], []
    for u, unit in enumerate(layout.units):
        numbers = [u if stage == 3 else own[unit.group]["params"][0] for _, own, _ in base]
        states.append([[base[number][0].get(numbers[number], {})] for number in sharing[unit.group]])
        by_rank = []
        for rank, number in enumerate(sharing[unit.group]):
            path, master = files.optimizers[number], saved[number][masters][u].detach()
            # The last rank's is saved without the padding behind it, but at stage 3.
            least = unit.partition_numel - (unit.padding(rank) if stage < 3 else 0)
            if not least <= master.numel() <= unit.partition_numel:
                raise UserError(
                    f"{path} holds {master.numel()} master weights of {'sub-' if stage == 3 else ''}group {u} where "
                    f"the closed form has {unit.partition_numel}: {WRONG}"
                )
            by_rank.append([_flats(master, states[u][rank][0], unit, rank, path)])
        flats.append(by_rank)
    params: list[list[ParamSpec]] = [[] for _ in groups]
    for unit, own in zip(layout.units, specs, strict=True):
        params[unit.group] += own
    found = Saved(
        layout=layout,
        params=params,
        flats=flats,
        states=states,
        groups=groups,
        description=description,
        has_state=bool(state),
        wrapper={key: saved[0][key] for key in _WRAPPER if key in saved[0]},
        column=column,
    )
    return of_experts(found, column, read_experts(files.experts, column), files) if column.experts else found


def _specs(model: Mapping[str, Any], files: Files) -> list[list[ParamSpec]]:
    shapes = model.get("param_shapes")
    if not isinstance(shapes, list):
        raise UserError(f"{files.models[0]} does not say which parameters the optimizer has")
    return [[ParamSpec(name=name, shape=tuple(shape)) for name, shape in group.items()] for group in shapes]


def _base_of(base: Any, files: Files, rank: int) -> _Base:
    """The optimizer's own state by tensor, its groups, and their description."""
    if not isinstance(base, Mapping) or "param_groups" not in base:
        raise UserError(f"{files.optimizers[rank]} holds no ordinary optimizer state (an elastic one is not read)")
    plain, description = without_description(dict(base))
    return plain["state"], plain["param_groups"], description


def _layout_of_sub_groups(
    specs: Sequence[Sequence[ParamSpec]],
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Any],
    sharing: Sequence[Sequence[int]],
    files: Files,
) -> Layout:
    owners = {number: g for g, group in enumerate(groups) for number in group["params"]}
    if len(specs) != len(owners) or any(len(sd["fp32_flat_groups"]) != len(specs) for sd in saved):
        raise UserError(f"{files.folder} has {len(specs)} sub-groups and state of {len(owners)}: {WRONG}")
    units = (
        Unit(group=owners[u], params=tuple(own), cut="each", world_size=len(sharing[owners[u]]))
        for u, own in enumerate(specs)
    )
    return Layout(stage=3, world_size=len(saved), units=tuple(units))


def _flat_layout(
    specs: Sequence[Sequence[ParamSpec]],
    saved: Sequence[Mapping[str, Any]],
    stage: int,
    files: Files,
    robin: bool,
    sharing: Sequence[Sequence[int]],
) -> Layout:
    """The closed form whose addresses are those in the files."""
    for alignment in (1, 4, 8):  # without zero_optimization.parameter_alignment, with it in fp32, and in 16 bits
        plain, layout = (
            build_layout(
                specs,
                stage=stage,
                world_size=len(saved),
                param_alignment=alignment,
                round_robin=order,
                group_ranks=list(map(len, sharing)),
            )
            for order in (False, robin)
        )
        # DeepSpeed leaves the order out of the addresses that it writes, unless it has padding to account for.
        marks = [own if has_padding(own) else before for before, own in zip(plain.units, layout.units, strict=True)]
        for marked in (layout, replace(layout, units=tuple(marks))):
            if _same_addresses(marked, saved, sharing):
                return layout
    raise UserError(f"the addresses in {files.folder} are not the closed form's: {WRONG}")


def _same_addresses(layout: Layout, saved: Sequence[Mapping[str, Any]], sharing: Sequence[Sequence[int]]) -> bool:
    if any(len(sd["param_slice_mappings"]) != len(layout.units) for sd in saved):
        return False
    for number, unit in enumerate(layout.units):
        for rank, place in enumerate(sharing[unit.group]):
            held = {unit.params[s.param].name: (s.numel, s.offset) for s in unit.slices(rank)}
            mapping = saved[place]["param_slice_mappings"][number]
            if {name: (address.numel, address.start) for name, address in mapping.items()} != held:
                return False
    return True


def _flats(master: Tensor, state: Mapping[str, Any], unit: Unit, rank: int, path: Path) -> Flats:
    """Masters, buffers and scales of one flat partition; other entries of its state are left out."""
    found: dict[str, Tensor] = {MASTER: master}
    for key, value in numbered(state).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        blocks = sum(count for _, count in blocks_of(unit, rank).values()) if key == SCALES_OF_MOMENTUM else None
        if value.dim() != 1 or value.numel() != (unit.partition_numel if blocks is None else blocks):
            raise UserError(
                f"{path}: the optimizer's {key} has shape {tuple(value.shape)} and is no value for each element: "
                "only optimizers that keep such values can be cut anew; write --reset-optimizer to leave it out"
            )
        found[key] = value
    return found
