"""Which checkpoint a run goes on from: the newest complete one, decided by all ranks together."""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.job.run_log import LOG_NAME
from ds_optim.job.settings import TrainSettings, default_warmup
from ds_optim.machine import ranks
from ds_optim.machine.files import Unreadable, parse_json, read_bytes, short
from ds_optim.machine.kept_results import refuse
from ds_optim.survival import manifest, recut
from ds_optim.survival.identity import OF_THE_OPTIMIZER, check_notes, misplaced, missing_files
from ds_optim.survival.reshard_seal import notes_for
from ds_optim.survival.results import deciding

FOLDER = "checkpoints"
FIRST_RELEASE = "whole.json"
"""Sealed the checkpoints of the first release, without names and checksums of the files."""
SEALS = (manifest.NAME, FIRST_RELEASE)

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A sealed checkpoint: its ``step``, folder, files (of a first release: None), and what ``save`` noted.

    ``bound``: whether each file says, within, of which save it is.
    """

    step: int
    folder: Path
    notes: dict[str, Any]
    files: dict[str, manifest.Entry] | None
    bound: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The checkpoint to go on from, why newer ones were skipped, and what else is to be said, one line each.

    ``original`` is the run's own, where ``checkpoint`` is what was cut of it. ``warmup`` is the run's from its first
    start, for one that says nothing of it now.
    """

    checkpoint: Checkpoint
    original: Checkpoint
    skipped: tuple[str, ...]
    warmup: int
    said: tuple[str, ...] = ()


def step_folders(folder: Path) -> dict[int, Path]:
    """The folders that ``save`` made under ``folder``, by step; links are none of them."""
    found = {}
    for path in folder.glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return found


def to_resume(settings: TrainSettings) -> Choice | None:
    """The checkpoint that this run goes on from, or None for a run that starts. Collective.

    Raises ``UserError`` where it may not go on from it, and where a new run would write over one.
    """
    if settings.out is None:
        return None
    folder = settings.out / FOLDER
    ranks.from_first(lambda: recut.forget(settings))
    if not settings.resume:
        if ranks.from_first(lambda: any(_is_sealed(path) for path in step_folders(folder).values())):
            raise UserError(
                f"{settings.out} holds checkpoints of an earlier run; add --resume to go on, or give another --out"
            )
        if not settings.force:
            instead = "add --resume to go on, --force to replace it, or give another --out"
            out = settings.out
            ranks.from_first(lambda: refuse(out, [LOG_NAME], instead))
        return None
    choice, skipped = newest_complete(folder)
    if choice is None:
        reasons = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(
            f"--resume: no complete checkpoint under {folder}{reasons}; start with --force in place of --resume"
        )
    shape = recut.Shape(ranks.world_size(), settings.stage)
    was = recut.Shape(choice.notes["world_size"], choice.notes["trajectory"]["stage"])
    if was == shape or choice.files is None:
        warmup, said = _check(choice, settings)
        return Choice(checkpoint=choice, original=choice, skipped=skipped, warmup=warmup, said=said)
    warmup, said = _check(replace(choice, notes=notes_for(choice.notes, *shape)), settings)
    ranks.from_first(lambda: recut.write(choice.folder, settings, shape))
    cut, faults = newest_complete(recut.place(settings))
    if cut is None:
        raise UserError(f"--resume: what was cut anew of {choice.folder} is not whole: {'; '.join(faults)}")
    said = (recut.line(choice.step, was, shape, settings), *said)
    return Choice(checkpoint=cut, original=choice, skipped=skipped, warmup=warmup, said=said)


def newest_complete(folder: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint whose every file is as it was sealed, and why newer ones are not. Collective."""
    steps: dict[int, Path] = ranks.from_first(lambda: step_folders(folder))
    skipped: list[str] = []
    for step in sorted(steps, reverse=True):
        found: Checkpoint | str = ranks.from_first(partial(_open, step, steps[step]))
        if isinstance(found, str):
            problem: str | None = found
        else:
            problem = _verify(found)
            if problem is None:
                return found, tuple(skipped)
        skipped.append(f"skipped {steps[step].name}: {problem}")
    return None, tuple(skipped)


def _is_sealed(folder: Path) -> bool:
    return any(os.path.lexists(folder / seal) for seal in SEALS)


def _open(step: int, folder: Path) -> Checkpoint | str:
    """A sealed checkpoint, its files not looked at yet, or why it is none."""
    seal = next((name for name in SEALS if os.path.lexists(folder / name)), None)
    if seal is None:
        return f"its save did not end (it has no {manifest.NAME})"
    files: dict[str, manifest.Entry] | None = None
    bound = False
    try:
        if seal == manifest.NAME:
            sealed = manifest.read(folder)
            notes, files, bound = sealed.notes, sealed.files, sealed.bound
        else:
            notes = parse_json(read_bytes(folder / seal))
        check_notes(notes, bound=bound)
        missing = missing_files(notes, [path.name for path in folder.iterdir()] if files is None else files)
    except manifest.ManifestError as error:
        return str(error)
    except Unreadable as reason:
        return f"{seal} {reason}"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if notes["step"] != step:
        return "its manifest is of another folder"
    if missing is not None:
        return missing
    return Checkpoint(step=step, folder=folder, notes=notes, files=files, bound=bound)


def _verify(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the checkpoint's files, each read by one rank; the same on every rank. Collective."""
    if checkpoint.files is None:
        return ranks.from_first(lambda: _first_release_fault(checkpoint))
    mine = sorted(checkpoint.files)[ranks.rank() :: ranks.world_size()]
    faults = (_fault(checkpoint, name, checkpoint.files[name]) for name in mine)
    gathered = ranks.gather(next((line for line in faults if line is not None), None))
    return next((line for line in gathered if line is not None), None)


def _fault(checkpoint: Checkpoint, name: str, entry: manifest.Entry) -> str | None:
    return manifest.fault(checkpoint.folder, name, entry) or misplaced(
        checkpoint.folder, name, checkpoint.notes, bound=checkpoint.bound
    )


def _first_release_fault(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint that names no files: torch's own checksums are read."""
    for path in sorted(checkpoint.folder.glob("*_states.pt")):
        # First what it would unpack to, and whether it holds data alone.
        problem = misplaced(checkpoint.folder, path.name, checkpoint.notes, bound=False)
        if problem is not None:
            return problem
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile):
            damaged = path.name
        if damaged is not None:
            return f"{path.name} is damaged"
    return None


def _check(checkpoint: Checkpoint, settings: TrainSettings) -> tuple[int, tuple[str, ...]]:
    """The warmup of the run that wrote the checkpoint, and what is to be said of going on from it. Raises ``UserError``
    where that was another run."""
    if checkpoint.notes["world_size"] != ranks.world_size():
        raise UserError(
            f"--resume: the checkpoint is of {checkpoint.notes['world_size']} ranks,"
            f" this run has {ranks.world_size()}; start as many: the first release wrote it, which is not cut anew"
        )
    before, now = dict(checkpoint.notes["trajectory"]), json.loads(json.dumps(settings.trajectory()))
    before["deepspeed"], now["deepspeed"] = deciding(before.get("deepspeed")), deciding(now["deepspeed"])
    free: tuple[str, ...] = OF_THE_OPTIMIZER if settings.reset_optimizer else ()
    # A checkpoint that was handed to another optimizer notes none; its state says which one may load it.
    free += tuple(name for name in OF_THE_OPTIMIZER if name not in before)
    said: tuple[str, ...] = ()
    was = before.get("steps")
    if isinstance(was, int) and 0 < was < now["steps"]:
        free += ("steps",)
        said = (
            f"extended from {was} steps to {now['steps']}: from here on the learning rate is that of a cosine over"
            f" {now['steps']} steps, not of what is left of the old one",
        )
    warmup = before.get("warmup")
    if not isinstance(warmup, int) or warmup < 0:
        warmup = now["warmup"]
    if now["warmup"] == default_warmup(now["steps"]):
        free += ("warmup",)
    for name in now:
        if name not in free and before.get(name) != now[name]:
            raise UserError(
                f"--resume: the run in {settings.out} had {name} = {short(repr(before.get(name)))},"
                f" this one has {short(repr(now[name]))};"
                f" give the same {name}, or another --out"
                f"{', or --reset-optimizer' if name in OF_THE_OPTIMIZER else ''}"
                f"{', or more of them to extend it' if name == 'steps' else ''}"
            )
    return warmup, said
