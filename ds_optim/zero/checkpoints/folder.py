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
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_WHOLE_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_\d+_expert_\d+_mp_rank_00_model_states\.pt")
_EXPERTS_OPTIM = re.compile(r"expp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_OTHERS = {
    "layer_": "a pipeline's file",
    "offloaded_tensors": "state that was offloaded to NVMe",
    "zero": "a universal checkpoint",
}

STAMP = "ds_optim_seal"
"""The key in the file's dict; DeepSpeed hands what it does not know to the client's state."""

Stamps = Callable[[str], Mapping[str, Any]]
"""The stamp of a file by its name."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one tensor-parallel rank: ``models`` and ``optimizers`` by data-parallel rank (one model file, and
    none of the optimizer's own, where it was saved so), and ``prefix``, what optimizer files of this dtype begin with.

    experts: a file for each expert of each layer. expert_optimizers: at stage 0, one for each rank among which experts
    are dealt out.
    """

    folder: Path
    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]
    prefix: str
    experts: tuple[Path, ...] = ()
    expert_optimizers: tuple[Path, ...] = ()


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


def find_files(folder: Path) -> list[Files]:
    """The files of a checkpoint by tensor-parallel rank, none of them missing.

    Raises:
        UserError: naming what is missing, or what makes it a checkpoint of another kind.
    """
    entries = sorted(folder.iterdir())
    experts = [entry for entry in entries if _EXPERT.fullmatch(entry.name)]
    for entry in entries:
        _check_inside(entry, folder)
        for beginning, what in _OTHERS.items():
            begins = beginning.endswith("_") and entry.name.startswith(beginning) and entry not in experts
            if begins or entry.name == beginning:
                raise UserError(f"{entry} is {what}, which ds-optim reshard does not read")
    optim = {entry: match for entry in entries if (match := _OPTIM.fullmatch(entry.name))}
    model = {entry: match for entry in entries if (match := _MODEL.fullmatch(entry.name))}
    one = {int(match[1]): entry for entry in entries if (match := _WHOLE_MODEL.fullmatch(entry.name))}
    if not model and not one:
        raise UserError(f"{folder} holds no DeepSpeed checkpoint: there is no *_model_states.pt in it")
    prefixes = {match[1] or "" for match in optim.values()}
    if len(prefixes) > 1:
        raise UserError(f"{folder} holds files of two checkpoints, with and without the prefix bf16_: remove one")
    prefix = prefixes.pop() if prefixes else ""
    ranks = {(int(match[3]), int(match[2])): entry for entry, match in optim.items()}
    models = {(int(match[2]), int(match[1])): entry for entry, match in model.items()}
    own = {int(m[1]): entry for entry in entries if (m := _EXPERTS_OPTIM.fullmatch(entry.name))}
    tensor = max(number for number, _ in (*ranks, *models, *((number, 0) for number in one))) + 1
    data = max([rank for _, rank in (*ranks, *models)], default=-1) + 1
    found = []
    for number in range(tensor):
        for rank in range(data):
            if (number, rank) not in ranks:
                raise _missing(folder, optimizer_file(rank, prefix, number))
            if models and (number, rank) not in models:
                raise _missing(folder, model_file(rank, 3, number))
        if not models and number not in one:
            raise _missing(folder, model_file(0, 0, number))
        found.append(
            Files(
                folder=folder,
                models=tuple(models[number, rank] for rank in range(data)) if models else (one[number],),
                optimizers=tuple(ranks[number, rank] for rank in range(data)),
                prefix=prefix,
                experts=tuple(experts),
                expert_optimizers=tuple(own[rank] for rank in sorted(own)),
            )
        )
    if tensor > 1 and experts:
        raise UserError(f"{folder} is of experts beside tensor parallelism, which ds-optim reshard does not read")
    return found


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"{folder / name} is missing: the checkpoint is not whole")


def _check_inside(entry: Path, folder: Path) -> None:
    try:
        outside = entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        outside = True
    if outside:
        raise UserError(f"{entry} is a link to a place outside of the checkpoint: put the file itself there")


def model_file(rank: int, stage: int, tensor: int = 0) -> str:
    own = f"mp_rank_{tensor:02d}_model_states.pt"
    return f"zero_pp_rank_{rank}_{own}" if stage == 3 else own


def optimizer_file(rank: int, prefix: str, tensor: int = 0) -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{tensor:02d}_optim_states.pt"


def expert_file(layer: int, expert: int) -> str:
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def expert_optimizer_file(number: int) -> str:
    return f"expp_rank_{number}_mp_rank_00_optim_states.pt"


def stamped(content: Mapping[str, Any], name: str, stamps: Stamps | None) -> dict[str, Any]:
    """What is to be written to the file ``name``; an earlier stamp goes."""
    bare = {key: value for key, value in content.items() if key != STAMP}
    return bare if stamps is None else {**bare, STAMP: dict(stamps(name))}
