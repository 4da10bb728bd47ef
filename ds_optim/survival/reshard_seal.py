"""Checkpoints of ``ds-optim train`` stay what they are when they are cut anew: checked before, sealed after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable
from ds_optim.survival import manifest
from ds_optim.survival.identity import (
    DIGESTS,
    OF_THE_OPTIMIZER,
    RUN,
    SAVE,
    check_notes,
    misplaced,
    missing_files,
    new_id,
    stamps_of,
)
from ds_optim.zero.checkpoints.folder import find_folder
from ds_optim.zero.checkpoints.reshard import Seal, Sealing
from ds_optim.zero.checkpoints.target import Target


def sealed_notes(source: Path) -> dict[str, Any] | None:
    """What the run noted in the manifest of a checkpoint whose files are as they were sealed; None without one.

    Raises:
        UserError: a file is not as it was, or not one of this checkpoint.
    """
    folder = find_folder(source)
    if not os.path.lexists(folder / manifest.NAME):
        return None
    try:
        sealed = manifest.read(folder)
        check_notes(sealed.notes, bound=sealed.bound)
    except manifest.ManifestError as problem:
        raise UserError(f"{folder}: {problem}") from None
    except Unreadable as reason:
        raise UserError(f"{folder}: {manifest.NAME} {reason}") from None
    missing = missing_files(sealed.notes, sealed.files)
    if missing is not None:
        raise UserError(f"{folder}: {missing}")
    faults = manifest.at_once(lambda name: manifest.fault(folder, name, sealed.files[name]), sealed.files)
    for name, changed in zip(sealed.files, faults, strict=True):
        fault = changed or misplaced(folder, name, sealed.notes, bound=sealed.bound)
        if fault is not None:
            raise UserError(f"{folder}: {fault}")
    return sealed.notes


def seal_like(notes: Mapping[str, Any] | None, *, handed_over: bool = False) -> Seal | None:
    """Seals the new folder with these notes, for its own ranks and stage; None where there are none.

    Args:
        handed_over: the state is another optimizer's now, whose settings the run that resumes says.
    """
    if notes is None:
        return None

    def seal(target: Target) -> Sealing:
        changed = notes_for(notes, target.processes, target.stage, handed_over=handed_over)
        return Sealing(stamps=stamps_of(changed), finish=lambda folder: manifest.seal_folder(folder, changed))

    return seal


def notes_for(notes: Mapping[str, Any], ranks: int, stage: int, *, handed_over: bool = False) -> dict[str, Any]:
    """The notes of a checkpoint, as of one that is cut anew for so many ranks at that stage."""
    changed: dict[str, Any] = {**notes, RUN: notes.get(RUN, new_id()), SAVE: new_id(), "world_size": ranks}
    before = notes["trajectory"]
    kept = {key: value for key, value in before.items() if key not in OF_THE_OPTIMIZER or not handed_over}
    changed["trajectory"] = {**kept, "stage": stage, **_same_batch(notes, ranks)}
    inputs = notes.get(DIGESTS)
    if handed_over and isinstance(inputs, Mapping):  # the other optimizer orthogonalizes in its own way
        changed[DIGESTS] = {key: value for key, value in inputs.items() if key != "polar"}
    return changed


def _same_batch(notes: Mapping[str, Any], wanted: int) -> dict[str, int]:
    """The sequences that each of the new ranks takes of the batch that the old ones shared, where it divides."""
    micro, ranks = notes["trajectory"].get("micro_batch"), notes.get("world_size")
    if not isinstance(micro, int) or not isinstance(ranks, int) or micro * ranks % wanted:
        return {}
    return {"micro_batch": micro * ranks // wanted}
