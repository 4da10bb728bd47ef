"""Loading in a run of other ranks, or at another stage: the checkpoint is cut anew on the way in."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.machine import ranks
from ds_optim.machine.files import drop_link
from ds_optim.optimizers.routing import in_stages
from ds_optim.zero.caller import tensor_ranks
from ds_optim.zero.checkpoints.columns import Column, experts_over
from ds_optim.zero.checkpoints.folder import find_folder
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.reader import open_columns
from ds_optim.zero.checkpoints.reshard import reshard
from ds_optim.zero.checkpoints.target import SETTINGS, Target, choose_target
from ds_optim.zero.pipeline import check_folder
from ds_optim.zero.swapped import is_swapped, load_folder

_CUT = "{tag}.recut"


def load_checkpoint(
    engine: Any, folder: str | Path, tag: str | None = None, *, scratch: str | Path | None = None, **options: Any
) -> tuple[str, Any]:
    """``engine.load_checkpoint`` of a checkpoint that other ranks wrote, or another ZeRO stage.

    Where its shape is the engine's, that is all. Otherwise rank 0 first cuts it anew as ``ds-optim reshard`` does,
    verified, with one rank's state in memory at a time; all ranks load that, and it is taken away. The checkpoint stays
    as it is. All ranks must make this call, and see the same folders. Tensor-parallel ranks, and ranks among which
    experts are dealt out, must be as many as they were; what a pipeline saved is not cut anew, nor state that is
    offloaded to NVMe.

    Args:
        engine: made with the optimizer that wrote the checkpoint; ``ds-optim reshard --optimizer`` changes it.
        folder: of all checkpoints, with ``latest`` where no ``tag`` is given.
        scratch: where what is cut lies meanwhile, as large as the checkpoint; beside it, in ``folder``, if left out.
        options: of ``engine.load_checkpoint``.

    Returns:
        The folder of the tag, and the client's state.

    Raises:
        UserError: on every rank: it is damaged, or cannot have this shape; what is cut cannot be written.
    """
    if is_swapped(engine):
        return _load_swapped(engine, Path(folder), tag, options)
    place = Path(folder)
    source: Path = ranks.from_first(lambda: find_folder(place if tag is None else place / tag))
    made = Path(place if scratch is None else scratch) / _CUT.format(tag=source.name)
    cut = ranks.from_first(lambda: _cut(source, made, engine))
    try:
        where = made if cut else source.parent
        path, state = engine.load_checkpoint(str(where), tag=source.name, **options)
    finally:
        if cut:
            ranks.from_first(lambda: take_away(made))
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing of {source}: see what it says above")
    return str(source), state


def _load_swapped(engine: Any, folder: Path, tag: str | None, options: dict[str, Any]) -> tuple[str, Any]:
    """Where optimizer state is offloaded to NVMe, which is not cut anew."""
    source: Path = ranks.from_first(lambda: find_folder(folder if tag is None else folder / tag))
    path, state = load_folder(engine, source, **options)
    if path is None:
        raise RuntimeError(f"DeepSpeed loaded nothing of {source}: see what it says above")
    return str(source), state


def _cut(source: Path, made: Path, engine: Any) -> bool:
    """Cut it where its shape is another one; whether it was."""
    if in_stages(engine.module):
        check_folder(engine.module, source)
        return False
    found = open_columns(source, state=False)[0]
    _check_columns(found.column, engine, source)
    target = _target(found, engine)
    if target == choose_target(found, None, None):
        return False
    take_away(made)
    config = {"zero_optimization": target.settings()}
    reshard(source, made, ranks=target.processes, stage=target.stage, config=config)
    return True


def _target(found: Portable, engine: Any) -> Target:
    zero = engine._config.zero_config
    config = {"zero_optimization": {**zero.model_dump(include=set(SETTINGS)), "stage": int(zero.stage)}}
    return choose_target(found, int(engine.seq_dp_world_size) * found.column.tensor_ranks, None, config)


def _check_columns(column: Column, engine: Any, source: Path) -> None:
    """Refuse a checkpoint of other parameters on each rank than the engine's ranks have.

    Raises:
        UserError: with what to load it with.
    """
    tensor = tensor_ranks(engine)
    here = 1 if tensor is None else tensor.world_size
    if column.tensor_ranks != here:
        raise UserError(
            f"{source} is of {column.tensor_ranks} tensor-parallel ranks, and this run has {here}: shards are cut anew "
            "for other data-parallel ranks and stages alone; start with as many"
        )
    over, there = experts_over(engine.optimizer.param_groups, source) or 1, column.count if column.experts else 1
    if over != there:
        raise UserError(
            f"{source} has experts over {there} ranks, and this run over {over}: they are cut anew for other ranks and "
            f"stages alone; train with ep_size (autoep_size) {there}"
        )


def take_away(made: Path) -> None:
    """Take away what was cut, now or by a start that a kill ended."""
    for folder in (made, made.with_name(f"{made.name}.partial")):
        with suppress(OSError):
            drop_link(folder)
            shutil.rmtree(folder)
