"""Saving a run so that no kill, crash or full disk takes what was saved before, and loading it again.

DeepSpeed writes ``OUT/checkpoints/step-N``; every rank checks its share of the files to the disk, rank 0 seals them
with a manifest, then moves ``latest``, then deletes what is no longer kept. At each moment of that, ``latest`` and
every folder with a manifest are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.job.results import Moment
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.machine.files import Unreadable, drop_link, read_line, write_atomic, write_reason
from ds_optim.survival import manifest
from ds_optim.survival.checkpoint_files import guarded, write
from ds_optim.survival.identity import DIGESTS, RUN, SAVE, new_id, stamps_of
from ds_optim.survival.resume import FOLDER, SEALS, Checkpoint, step_folders
from ds_optim.zero.checkpoints.folder import LATEST, SCRIPTS
from ds_optim.zero.swapped import load_folder


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Whether a checkpoint counts (``failure`` is None), and what else the user should know; one line each."""

    failure: str | None
    notes: tuple[str, ...] = ()


def save(
    engine: Any,
    settings: TrainSettings,
    step: int,
    place: dict[str, int],
    at: Callable[[Moment], None],
    inputs: Mapping[str, str],
    run: str,
) -> Saved:
    """Write the checkpoint of ``step``; where that fails on any rank, none counts and what was written is removed.

    Collective; the same ``Saved`` on every rank. ``place`` is the position of the text; ``at`` is told the moments
    of the save. ``inputs`` are the digests of what the run reads; ``run`` is the run's own name.
    """
    assert settings.out is not None
    folder = settings.out / FOLDER / f"step-{step}"
    note: str | None = None
    failure = _first_problem(lambda: _make_room(folder) if ranks.rank() == 0 else None, folder.parent)
    if failure is None:
        notes = {"step": step, "world_size": ranks.world_size(), "trajectory": settings.trajectory()}
        notes |= {DIGESTS: dict(inputs), RUN: run, SAVE: ranks.from_first(new_id)}
        state = {"step": step, "position": place}
        files = write(engine, folder, state, lambda: at("file written"), stamps_of(notes))
        failure, note = _first(files.problem), _first(files.note)
    if failure is None:
        failure = _seal(folder, notes, at)
    if failure is not None:
        _first_problem(lambda: manifest.remove(folder) if ranks.rank() == 0 else None, folder)
        return Saved(failure=f"the checkpoint of step {step} was not saved: {failure}; earlier ones are as they were")
    # From here on the checkpoint counts; what fails now is told and does not undo it.
    told = [note, _first_problem(lambda: point_latest(folder) if ranks.rank() == 0 else None, folder)]
    at("latest moved")
    told.append(_first_problem(lambda: _forget_old(folder, settings.keep) if ranks.rank() == 0 else None, folder))
    return Saved(failure=None, notes=tuple(f"after the checkpoint of step {step}: {line}" for line in told if line))


def load(engine: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Put weights, optimizer state and counters back; return the position of the text. Collective."""
    with guarded(engine):
        path, state = load_folder(engine, checkpoint.folder, load_lr_scheduler_states=False)
    return position(path, state, checkpoint)


def follow(checkpoint: Checkpoint) -> str | None:
    """Let ``latest`` name this checkpoint: a kill between a seal and ``latest``, or a damaged one, left it at another.

    What is to be said of it, in one line, or None. Collective.
    """
    return ranks.from_first(lambda: _follow(checkpoint.folder))


def _follow(folder: Path) -> str | None:
    try:
        named, said = read_line(folder.parent / LATEST), None
    except Unreadable as reason:
        named, said = None, f"{LATEST} {reason}: it is written anew and names {folder.name}"
    try:
        if named != folder.name:
            point_latest(folder)
    except OSError as error:
        return f"{LATEST} does not name {folder.name} and cannot be written: {error.strerror}"
    return said


def position(path: str | None, state: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Of the text, from what ``engine.load_checkpoint`` returned."""
    if path is None:
        raise UserError(f"DeepSpeed found no checkpoint in {checkpoint.folder}; remove that folder and resume again")
    found: dict[str, int] = state["position"]
    return found


def require_synchronous(engine: Any) -> None:
    """Raise ``UserError`` where DeepSpeed would still write when its save returns: nothing could be sealed then."""
    if engine.checkpoint_engine.is_decoupled():
        raise UserError('"checkpoint" in --config: a decoupled writer cannot be sealed; take "decoupled" out')


def point_latest(folder: Path) -> None:
    """Let ``engine.load_checkpoint`` without a tag find this checkpoint. One process; raises ``OSError``."""
    write_atomic(folder.parent / LATEST, folder.name)


def _seal(folder: Path, notes: dict[str, Any], at: Callable[[Moment], None]) -> str | None:
    """Measure every file, each on one rank, and write the manifest; why that failed, or None. Collective."""
    names: list[str] = ranks.from_first(lambda: manifest.list_files(folder))
    mine: dict[str, manifest.Entry] = {}

    def measure() -> None:
        for name in names[ranks.rank() :: ranks.world_size()]:
            mine[name] = manifest.measure(folder / name, sync=True)

    failure = _first_problem(measure, folder)
    if failure is not None:
        return failure
    files = {name: entry for share in ranks.gather(mine) for name, entry in share.items()}
    at("files written")
    failure = _first_problem(lambda: manifest.seal(folder, notes, files) if ranks.rank() == 0 else None, folder)
    if failure is None:
        at("sealed")
    return failure


def _make_room(folder: Path) -> None:
    """Remove what an earlier run left of this step: half written, or complete once and damaged since."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest.remove(folder, SEALS)
    for name in SCRIPTS:  # DeepSpeed copies them over what is there, through a link too
        drop_link(folder.parent / name)


def _forget_old(newest: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and saves before them that never ended; 0 keeps all.

    The one just sealed is always among the kept.
    """
    if keep == 0:
        return
    steps = step_folders(newest.parent)
    now = next(step for step, folder in steps.items() if folder == newest)
    sealed = [step for step in sorted(steps) if step <= now and any((steps[step] / seal).exists() for seal in SEALS)]
    for step in steps:
        if step < now and step not in sealed[-keep:]:
            manifest.remove(steps[step], SEALS)


def _first_problem(step: Callable[[], None], folder: Path) -> str | None:
    """Do a step that writes; why it failed on the first rank where it did, on every rank. Collective."""
    try:
        step()
    except (OSError, Unreadable, manifest.ManifestError) as error:
        return _first(write_reason(error, folder))
    return _first(None)


def _first(problem: str | None) -> str | None:
    for rank, line in enumerate(ranks.gather(problem)):
        if line is not None:
            return f"rank {rank}: {line}"
    return None
