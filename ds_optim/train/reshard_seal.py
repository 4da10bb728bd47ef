"""Checkpoints of ``ds-optim train`` stay what they are when they are cut anew: checked before, sealed after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.train import manifest
from ds_optim.train.resume import DIGESTS, OF_THE_OPTIMIZER
from ds_optim.zero.checkpoints.folder import find_folder
from ds_optim.zero.checkpoints.target import Target


def sealed_notes(source: Path) -> dict[str, Any] | None:
    """What the run noted in the manifest of a checkpoint whose files are as they were sealed; None without one.

    Raises:
        UserError: a file is not as it was.
    """
    folder = find_folder(source)
    if not (folder / manifest.NAME).exists():
        return None
    try:
        sealed = manifest.read(folder)
    except manifest.ManifestError as problem:
        raise UserError(f"{folder}: {problem}") from None
    for name, entry in sealed.files.items():
        fault = manifest.fault(folder, name, entry)
        if fault is not None:
            raise UserError(f"{folder}: {fault}")
    return sealed.notes


def seal_like(notes: Mapping[str, Any] | None, *, handed_over: bool = False) -> Callable[[Path, Target], None] | None:
    """Seals the new folder with these notes, for its own ranks and stage; None where there are none.

    Args:
        handed_over: the state is another optimizer's now, whose settings the run that resumes says.
    """
    if notes is None:
        return None

    def seal(folder: Path, target: Target) -> None:
        changed: dict[str, Any] = {**notes, "world_size": target.ranks}
        trajectory = notes.get("trajectory")
        if isinstance(trajectory, Mapping):
            kept = {key: value for key, value in trajectory.items() if not handed_over or key not in OF_THE_OPTIMIZER}
            changed["trajectory"] = {**kept, "stage": target.stage, **_same_batch(notes, target)}
        inputs = notes.get(DIGESTS)
        if handed_over and isinstance(inputs, Mapping):  # the other optimizer orthogonalizes in its own way
            changed[DIGESTS] = {key: value for key, value in inputs.items() if key != "polar"}
        manifest.seal_folder(folder, changed)

    return seal


def _same_batch(notes: Mapping[str, Any], target: Target) -> dict[str, int]:
    """The sequences that each of the new ranks takes of the batch that the old ones shared, where it divides."""
    micro, ranks = notes["trajectory"].get("micro_batch"), notes.get("world_size")
    if not isinstance(micro, int) or not isinstance(ranks, int) or micro * ranks % target.ranks:
        return {}
    return {"micro_batch": micro * ranks // target.ranks}
