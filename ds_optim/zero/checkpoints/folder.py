"""The files of an ordinary DeepSpeed checkpoint: which there are, which must be, and what they are called.

A file of a sealed checkpoint says within of which run, step and save it is, and its own name: a checksum beside it
tells whether it is as it was, not whether it belongs where it lies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable, read_line, short

LATEST = "latest"
SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
_ONE_MODEL = "mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")
_OTHERS = {
    "layer_": "a pipeline's or an expert's file",
    "expp_rank_": "an expert's file",
    "offloaded_tensors": "state that was offloaded to NVMe",
    "zero": "a universal checkpoint",
}

STAMP = "ds_optim_seal"
"""The key in the file's dict; DeepSpeed hands what it does not know to the client's state."""

Stamps = Callable[[str], Mapping[str, Any]]
"""The stamp of a file by its name."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """A checkpoint's files: ``models`` and ``optimizers`` by rank (one model file, and none of the optimizer's own,
    where it was saved so), and ``prefix``, what optimizer files of this dtype begin with."""

    folder: Path
    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]
    prefix: str


def find_folder(source: Path) -> Path:
    """The folder of a checkpoint's tag, from itself or from the folder whose ``latest`` names it.

    Raises:
        UserError: there is none, or ``latest`` names another place.
    """
    latest = source / LATEST
    if os.path.lexists(latest):
        try:
            tag = read_line(latest)
        except Unreadable as reason:
            raise UserError(f"{latest} {reason}: give the folder of a step instead of {source}") from None
        if not tag or tag in (".", "..") or Path(tag).name != tag or "\\" in tag or not tag.isprintable():
            raise UserError(f"{latest} holds {short(repr(tag))}, which is no name of a folder beside it")
        folder = source / tag
        if not _is_dir(folder):
            raise UserError(f"{latest} names {short(repr(tag))}, and there is no such folder beside it")
        _check_inside(folder, source)
        return folder
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    return source


def _is_dir(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # a name that is longer than any
        return False


def find_files(folder: Path) -> Files:
    """The files of a checkpoint, none of them missing.

    Raises:
        UserError: naming what is missing, or what makes it a checkpoint of another kind.
    """
    entries = sorted(folder.iterdir())
    for entry in entries:
        _check_inside(entry, folder)
        for beginning, what in _OTHERS.items():
            if entry.name == beginning or (beginning.endswith("_") and entry.name.startswith(beginning)):
                raise UserError(f"{entry} is {what}, which ds-optim reshard does not read")
    optim = {entry: match for entry in entries if (match := _OPTIM.fullmatch(entry.name))}
    model = {entry: match for entry in entries if (match := _MODEL.fullmatch(entry.name))}
    if any(int(m[3]) for m in optim.values()) or any(int(m[2]) for m in model.values()):
        raise UserError(f"{folder} is of a tensor-parallel run, whose shards are no whole parameters")
    one = folder / _ONE_MODEL
    if not model and not one.is_file():
        raise UserError(f"{folder} holds no DeepSpeed checkpoint: there is no *_model_states.pt in it")
    prefixes = {match[1] or "" for match in optim.values()}
    if len(prefixes) > 1:
        raise UserError(f"{folder} holds files of two checkpoints, with and without the prefix bf16_: remove one")
    prefix = prefixes.pop() if prefixes else ""
    ranks = {int(match[2]): entry for entry, match in optim.items()}
    models = {int(match[1]): entry for entry, match in model.items()}
    for rank in range(max([*ranks, *models], default=-1) + 1):
        if rank not in ranks:
            raise UserError(f"{folder / optimizer_file(rank, prefix)} is missing: the checkpoint is not whole")
        if models and rank not in models:
            raise UserError(f"{folder / model_file(rank, 3)} is missing: the checkpoint is not whole")
    return Files(
        folder=folder,
        models=tuple(models[rank] for rank in sorted(models)) or (one,),
        optimizers=tuple(ranks[rank] for rank in sorted(ranks)),
        prefix=prefix,
    )


def shape_of(folder: Path) -> tuple[int, int, int]:
    """(tensor-parallel ranks, data-parallel ranks, a stage of ZeRO) that a checkpoint's files are named by.

    Stages 1 and 2 name them alike, which are the same borders: 2 for both. Stage 0 has no data-parallel ranks.
    """
    names = [entry.name for entry in folder.iterdir()]
    optim = [match for match in map(_OPTIM.fullmatch, names) if match]
    model = [match for match in map(_MODEL.fullmatch, names) if match]
    tensor = {int(found[1]) for found in (re.search(r"mp_rank_(\d+)_", name) for name in names) if found}
    data = {int(match[2]) for match in optim}
    return max(tensor, default=0) + 1, max(data, default=-1) + 1, 3 if model else 2 if optim else 0


def has_experts(folder: Path) -> bool:
    """Whether a checkpoint is of experts in groups of their own, which DeepSpeed keeps in files of their own."""
    return any(_EXPERT.fullmatch(entry.name) for entry in folder.iterdir())


def check_experts(folder: Path, ranks: int, stage: int) -> None:
    """Refuse a checkpoint of experts that a run of other ranks saved, or at stage 0 for one that shards.

    Raises:
        UserError: with what to load it with.
    """
    _, saved, _ = shape_of(folder)
    if saved != (ranks if stage else 0):
        was = f"{saved} ranks" if saved else "ranks at stage 0"
        now = f"by {ranks} ranks" if stage else "at stage 0"
        raise UserError(
            f"{folder} was saved by {was} and is to be loaded {now}: experts in groups of their own are not cut anew; "
            "train with as many ranks, the same ep_size, and at stage 1 or 2 as it was saved (0 if at 0)"
        )


def _check_inside(entry: Path, folder: Path) -> None:
    try:
        outside = entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        outside = True
    if outside:
        raise UserError(f"{entry} is a link to a place outside of the checkpoint: put the file itself there")


def model_file(rank: int, stage: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else _ONE_MODEL


def optimizer_file(rank: int, prefix: str) -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def stamped(content: Mapping[str, Any], name: str, stamps: Stamps | None) -> dict[str, Any]:
    """What is to be written to the file ``name``; an earlier stamp goes."""
    bare = {key: value for key, value in content.items() if key != STAMP}
    return bare if stamps is None else {**bare, STAMP: dict(stamps(name))}
