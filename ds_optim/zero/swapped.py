"""Partitions that ZeRO-3 keeps in files between steps: ``offload_optimizer`` to NVMe, as DeepSpeed 0.19.8 does it.

DeepSpeed reads a sub-group's fp32 master weights, gradient and state into buffers before it calls ``step()``, and
writes them back after it. In between, its tensors are empty, and keep their identity. Every tensor of state goes
through a buffer of fp32, as long as the partition: what is of another dtype or length is marked ``swappable = False``
and stays in the host's memory. Sub-groups below 1 MiB are never written, and lie there too.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.machine import ranks
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.rules import RULES
from ds_optim.sharding.binding import Groups, Member
from ds_optim.sharding.layout import Layout

FOLDER = "offloaded_tensors"
"""Where DeepSpeed puts copies of the files, in a checkpoint."""
_SAVED = "optimizer_state_dict"
"""What ZeRO saves stands under this name in the file, and the optimizer's state in that once more."""
_BLOCK = 512
"""Bytes."""
NOT_LOADED = (
    "DeepSpeed 0.19 loads no optimizer state that is offloaded to NVMe with engine.load_checkpoint: load with "
    "ds_optim.load_checkpoint(engine, folder)"
)


def units_in_files(zero: Any) -> frozenset[int]:
    """The numbers of the sub-groups of a ZeRO-3 wrapper that lie in files between steps."""
    if not getattr(zero, "swap_optimizer", False):
        return frozenset()
    count = len(zero.fp32_partitioned_groups_flat)
    return frozenset(number for number in range(count) if zero._swappable_optimizer_subgroup(number))


def masters(zero: Any, layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The flat partitions to be looked at: those in files are mapped, page by page as they are read."""
    swapped = units_in_files(zero)
    found = []
    for number, (unit, tensor) in enumerate(zip(layout.units, tensors, strict=True)):
        if number in swapped:
            path = _info(zero, tensor).tensors[0].swap_path
            tensor = torch.from_file(str(path), shared=False, size=unit.partition_numel, dtype=tensor.dtype)
        found.append(tensor)
    return found


def shard_of(member: Member) -> Tensor:
    """The model's own weights of a parameter of ZeRO-3 in this rank: those in a file are mapped, as masters are."""
    parameter: Any = member.parameter
    held = parameter.ds_tensor
    if getattr(getattr(held, "status", None), "name", None) == "NOT_AVAILABLE":
        path = parameter.nvme_swapper.get_path(parameter, must_exist=True)
        held = torch.from_file(str(path), shared=False, size=held.ds_numel, dtype=parameter.dtype)
    return held


def check_buffers(zero: Any, layout: Layout, groups: Groups) -> None:
    """Refuse fewer buffers than the sub-groups that are in memory at a time need, before one is waited for.

    Raises:
        UserError: with the number to write.
    """
    swapped = units_in_files(zero)
    if not swapped:
        return
    kept = [RULES[groups[layout.units[number].group]["rule"]].element_dtypes(torch.float32) for number in swapped]
    per_unit = 2 + max(map(len, kept))
    config = zero.optimizer_swapper.swap_config
    at_once = min(len(swapped), 1 + bool(config.pipeline_read) + bool(config.pipeline_write))
    needed = per_unit * at_once
    if config.buffer_count < needed:
        raise UserError(
            f"zero_optimization.offload_optimizer.buffer_count is {config.buffer_count}: write {needed} or more, for "
            f"weights, gradient and state of {at_once} sub-group{'s' * (at_once > 1)} at a time"
        )


def check_gradients(zero: Any, layout: Layout) -> None:
    """Refuse a sub-group in which DeepSpeed would read a gradient to where its reads do not reach, and say nothing.

    It reads without the system's cache, which asks for addresses in whole blocks. Where a buffer's part begins between
    two, the part stays as it was: DeepSpeed's own AdamW is stepped with zeros there.

    Raises:
        UserError: with what to write instead.
    """
    swapper: Any = getattr(zero, "optimizer_swapper", None)
    for number in units_in_files(zero):
        unit, offset = layout.units[number], 0
        for spec in unit.params:
            shard, itemsize = -(-spec.numel // unit.world_size), swapper.swap_element_size
            if offset * itemsize % _BLOCK and swapper.is_swappable_tensor(numel=shard):
                raise UserError(
                    f"DeepSpeed 0.19 would not read the gradient of {spec.name} from its file, which begins "
                    f"{offset * itemsize:,} bytes into a sub-group, no multiple of {_BLOCK}: set "
                    "zero_optimization.sub_group_size to 1, so that each parameter is a sub-group of its own"
                )
            offset += shard


class Files:
    """What a step has to know of sub-groups in files: which they are, and what is to be put right before each."""

    def __init__(self, zero: Any, optimizer: Any, engine: Any, members: Sequence[Sequence[Member]]) -> None:
        self.units = units_in_files(zero)
        self._zero = zero
        self._members = members
        # Neither lives longer for it.
        self._engine = None if engine is None else weakref.ref(engine)
        self._optimizer = weakref.ref(optimizer)

    def check(self) -> None:
        """Refuse to step on after a load that has left state behind.

        Raises:
            UserError: on every rank alike, as all of them load.
        """
        engine = self._engine() if self._engine is not None else None
        loaded = getattr(engine, "loaded_checkpoint_dp_world_size", None) is not None
        optimizer = self._optimizer()
        if loaded and isinstance(optimizer, ZeroOptimizer) and not optimizer.has_loaded:
            raise UserError(NOT_LOADED)

    def settle(self, number: int, tensor: Tensor, state: Mapping[str, Any]) -> None:
        """Before a sub-group is stepped: gradients that nobody made are zeros, and state stays that files cannot carry.

        DeepSpeed reads gradients into a buffer that held something else: of a parameter that had none since the last
        step it hands over what was there, or an old gradient. It keeps a norm of each gradient that was made.
        """
        keep(state, tensor.numel())
        zero = self._zero
        for member in self._members[number]:
            key = zero.get_param_id(member.parameter)
            if key not in zero.norm_for_param_grads and tensor.grad is not None:
                _, offset, numel = zero.grad_position[key]
                tensor.grad.narrow(0, offset, numel).zero_()

    def release(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Between steps, let go of buffers that DeepSpeed's pipelined reader leaves in the hands of tensors: they are
        for other partitions now, and what is in them would be saved for this one's."""
        for number in self.units:
            flat = self._zero.fp32_partitioned_groups_flat[number]
            numel = int(self._zero.fp16_partitioned_groups_flat_numel[number])
            for value in (flat, *states.get(flat, {}).values()):
                if _is_carried(value, numel):
                    value.data = torch.empty(0, dtype=value.dtype, device=value.device)


def keep(state: Mapping[str, Any], numel: int) -> None:
    """Mark what DeepSpeed's files cannot carry, of the state of a partition of ``numel`` elements."""
    for value in state.values():
        if isinstance(value, Tensor) and not _is_carried(value, 0, numel):
            value.swappable = False  # type: ignore[attr-defined]


def _is_carried(value: Any, *sizes: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() in sizes


def is_swapped(engine: Any) -> bool:
    """Whether an engine keeps optimizer state in files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def load_folder(engine: Any, source: Path, **options: Any) -> tuple[str | None, Any]:
    """``engine.load_checkpoint`` of the folder ``source``, wherever the engine keeps optimizer state. Collective."""
    if is_swapped(engine):
        return load(engine, source, **options)
    path, state = engine.load_checkpoint(str(source.parent), tag=source.name, **options)
    return path, state


def load(engine: Any, source: Path, **options: Any) -> tuple[str | None, Any]:
    """``engine.load_checkpoint`` of the folder ``source`` by an engine that keeps optimizer state in files. Collective.

    DeepSpeed copies the files back, and reads nothing but master weights of them, and nothing of what was in memory:
    that is loaded here, and the files of state are made known to it.

    Raises:
        UserError: on every rank: the checkpoint is not of such an engine, of as many ranks, or not whole.
    """
    ranks.from_first(lambda: _check_source(engine, source))
    if options.get("load_module_only") or options.get("load_optimizer_states") is False:
        raise UserError(
            "DeepSpeed 0.19 loads weights with state that is offloaded to NVMe, or not at all: leave "
            "load_module_only and load_optimizer_states out"
        )
    zero = engine.optimizer
    files = _folder_of(engine, source)
    ranks.together(lambda: _check_masters(zero, files))
    path, state = engine.load_checkpoint(str(source.parent), tag=source.name, **options)
    if path is None:
        return path, state
    name = engine._get_zero_ckpt_name(str(source.parent), source.name)
    own = engine.checkpoint_engine.load(name, map_location="cpu")[_SAVED]
    zero.checkpoint_event_prologue()
    ranks.together(lambda: _load_state(zero, own, files))
    zero.reset_swap_buffers()  # the model's weights from the masters, in files and in memory
    zero.checkpoint_event_epilogue()
    return path, state


def _folder_of(engine: Any, source: Path) -> Path:
    """Where a checkpoint has this rank's files."""
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    return source / FOLDER / f"rank{rank:0>2d}"


def _check_source(engine: Any, source: Path) -> None:
    saved = len(list((source / FOLDER).glob("rank*")))
    now = ranks.world_size()
    if not saved:
        raise UserError(
            f"{source} holds no state that was offloaded to NVMe, and this run has its state there: load it with "
            'offload_optimizer.device "cpu", or start anew'
        )
    if saved != now and not engine.use_node_local_storage():
        raise UserError(
            f"{source} was saved by {saved} ranks with state offloaded to NVMe, and this run has {now}: such state is "
            f"not cut anew; start {saved} ranks"
        )


def _load_state(zero: Any, saved: Mapping[str, Any], files: Path) -> None:
    """What ZeRO-3's ``load_state_dict`` does, but for partitions in files, which it takes for empty ones."""
    for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        setattr(zero, name, saved[name])
    swapped, flats = units_in_files(zero), zero.fp32_partitioned_groups_flat
    sizes = [0 if number in swapped else flat.numel() for number, flat in enumerate(flats)]
    if [flat.numel() for flat in saved["fp32_flat_groups"]] != sizes:
        raise UserError(
            f"{files} was saved with other partitions in files than this run has: write the sub_group_size "
            "and the aio of the run that saved it"
        )
    zero._set_fp32_optimizer_param_groups()
    try:
        zero.optimizer.load_state_dict(saved[_SAVED])
    finally:
        zero._clear_fp32_optimizer_param_groups()
    zero.optimizer_swapper.purge_state()
    for number, (flat, master) in enumerate(zip(flats, saved["fp32_flat_groups"], strict=True)):
        if number in swapped:
            _attach(zero, flat, int(zero.fp16_partitioned_groups_flat_numel[number]), files)
        else:
            flat.data.copy_(master)


def _attach(zero: Any, flat: Tensor, numel: int, files: Path) -> None:
    """Let DeepSpeed read the state of a partition from the files that it has copied back."""
    info, state = _info(zero, flat), zero.optimizer.state[flat]
    keep(state, numel)
    for key, value in state.items():
        if _is_carried(value, 0):
            value.ds_id = f"{key}-{flat.ds_id}"  # type: ignore[attr-defined]
            info.add_state_tensors([value])
    _check_files(zero, flat, numel, files)


def _check_masters(zero: Any, files: Path) -> None:
    """Before DeepSpeed copies anything: it names files by parameters, and numbers those through a process's life."""
    for number in units_in_files(zero):
        flat = zero.fp32_partitioned_groups_flat[number]
        _check_files(zero, flat, int(zero.fp16_partitioned_groups_flat_numel[number]), files)


def _check_files(zero: Any, flat: Tensor, numel: int, files: Path) -> None:
    """Refuse a checkpoint that has not all files of a partition, each as long as it must be."""
    due = zero.optimizer_swapper._io_aligned_numel(numel) * flat.element_size()
    for swapped in map(Path, _info(zero, flat).get_swap_paths()):
        path = files / swapped.name
        size = path.stat().st_size if path.is_file() else 0
        if size != due:
            raise UserError(
                f"{path} has {size} of {due} bytes: the checkpoint is not whole, or of another model or "
                "sub_group_size, or this is not the first model of its process: load it in a new one"
            )


def _info(zero: Any, flat: Any) -> Any:
    """What DeepSpeed's swapper knows of a partition."""
    return zero.optimizer_swapper.swap_params_info[flat.ds_id]
