"""A checkpoint of another shape: read, write, hold against each other, and only then show."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.zero.checkpoints.folder import Stamps, find_folder
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.reader import open_columns
from ds_optim.zero.checkpoints.safe import laid_out
from ds_optim.zero.checkpoints.target import Target, choose_target
from ds_optim.zero.checkpoints.verify import check_masters, differences
from ds_optim.zero.checkpoints.writer import write_checkpoint

Change = Callable[[Portable], Portable]


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """What each file of a new checkpoint says of itself, and who seals the folder that has them all."""

    stamps: Stamps
    finish: Callable[[Path], None]


Seal = Callable[[Target], Sealing]


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """What was read, what was written, its shape, and its folder.

    Of a checkpoint in columns the first one; all are written.
    """

    source: Portable
    written: Portable
    target: Target
    folder: Path


def reshard(
    source: Path,
    place: Path,
    *,
    ranks: int | None = None,
    stage: int | None = None,
    config: Mapping[str, Any] | None = None,
    change: Change | None = None,
    seal: Seal | None = None,
    state: bool = True,
) -> Resharded:
    """Write the checkpoint in ``source`` as ``ranks`` ranks at ZeRO ``stage`` would have saved it.

    Args:
        source: a tag's folder, or the folder above it with ``latest``.
        place: a new folder, which gets the tag's folder and ``latest``; it appears when all is written and verified.
        ranks, stage: of the run that is to load it, tensor-parallel ranks counted in; the checkpoint's own where left
            out.
        config: that run's DeepSpeed JSON, for sub_group_size and parameter_alignment.
        change: what else becomes of it, such as another optimizer.
        seal: stamps the files as they are written, and seals the verified folder of the tag before it appears.
        state: False leaves the optimizer's state behind: weights, schedule and the place in the data stay.

    Raises:
        UserError: a checkpoint that cannot be read, a place that is taken.
        RuntimeError: what was written is not what was read; nothing is left of it.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is there already: give the name of a new folder")
    folder = find_folder(source)
    found = open_columns(source, state=state)
    with laid_out(folder):
        for portable in found:
            check_masters(portable)
        wanted = found if change is None else [change(portable) for portable in found]
        target = choose_target(wanted[0], ranks, stage, config)
    partial = place.with_name(f"{place.name}.partial")
    if partial.exists():
        raise UserError(f"{partial} is left of a run that did not end: remove it")
    try:
        sealed = seal(target) if seal is not None else None
        _write(wanted, target, partial, folder, sealed.stamps if sealed is not None else None)
        if sealed is not None:
            sealed.finish(partial / _tag(folder))
        if place.exists():
            place.rmdir()
        partial.replace(place)
    except OSError as problem:
        raise UserError(f"cannot write {place}: {problem.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Resharded(source=found[0], written=wanted[0], target=target, folder=place / _tag(folder))


def _tag(folder: Path) -> str:
    return folder.resolve().name


def _write(wanted: list[Portable], target: Target, partial: Path, source: Path, stamps: Stamps | None) -> None:
    """Write it, and raise ``RuntimeError`` for what a load would miss."""
    tag = _tag(source)
    with laid_out(source):
        write_checkpoint(wanted, target, partial, tag, stamps)
        names = [group.params for group in wanted[0].groups]
        made = open_columns(partial / tag, names)
        wrong = [what for one, other in zip(made, wanted, strict=True) for what in differences(one, other, target)]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise RuntimeError(f"what was written is not what was read: {shown}. An error in ds-optim, or the disk's")
