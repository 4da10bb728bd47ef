"""Saving a run and going on from its newest whole checkpoint.

DeepSpeed writes ``OUT/checkpoints/step-N``; a small ``whole.json`` goes in last, by an atomic rename after
all ranks are done, so a checkpoint that a killed run left half written is never taken.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_optim.errors import UserError
from ds_optim.train import ranks
from ds_optim.train.settings import TrainSettings

FOLDER = "checkpoints"
_WHOLE = "whole.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint: its ``step``, folder, and what ``save`` noted of the run."""

    step: int
    folder: Path
    notes: dict[str, Any]


def save(engine: Any, settings: TrainSettings, step: int, position: dict[str, int]) -> None:
    """Write the checkpoint of ``step``. Collective."""
    assert settings.out is not None
    folder = settings.out / FOLDER
    tag = f"step-{step}"
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step, "position": position})
    if ranks.world_size() > 1:
        dist.barrier()
    notes = {"step": step, "world_size": ranks.world_size(), "trajectory": settings.trajectory()}

    def seal() -> None:
        partial = folder / tag / f"{_WHOLE}.partial"
        partial.write_text(json.dumps(notes), encoding="utf-8")
        partial.replace(folder / tag / _WHOLE)

    ranks.from_first(seal)


def newest(out: Path) -> Checkpoint | None:
    """The whole checkpoint of the highest step under ``out``, or None."""
    found = []
    for path in (out / FOLDER).glob(f"step-*/{_WHOLE}"):
        notes = json.loads(path.read_text(encoding="utf-8"))
        found.append(Checkpoint(step=int(notes["step"]), folder=path.parent, notes=notes))
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def to_resume(settings: TrainSettings) -> Checkpoint | None:
    """The checkpoint that this run goes on from, or None.

    Raises ``UserError`` where it may not go on from it, and where a new run would write over one.
    """
    if settings.out is None:
        return None
    checkpoint = newest(settings.out)
    if not settings.resume:
        if checkpoint is not None:
            raise UserError(
                f"{settings.out} holds checkpoints of an earlier run; add --resume to go on, or give another --out"
            )
        return None
    if checkpoint is None:
        raise UserError(f"--resume: no whole checkpoint under {settings.out / FOLDER}; start without --resume")
    _check(checkpoint, settings)
    return checkpoint


def load(engine: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Put weights, optimizer state and counters back; return the position of the text. Collective."""
    path, state = engine.load_checkpoint(
        str(checkpoint.folder.parent), tag=checkpoint.folder.name, load_lr_scheduler_states=False
    )
    if path is None:
        raise UserError(f"DeepSpeed found no checkpoint in {checkpoint.folder}; remove that folder and resume again")
    position: dict[str, int] = state["position"]
    return position


def _check(checkpoint: Checkpoint, settings: TrainSettings) -> None:
    """Raise ``UserError`` where the run that wrote the checkpoint was another one."""
    if checkpoint.notes["world_size"] != ranks.world_size():
        raise UserError(
            f"--resume: the checkpoint is of {checkpoint.notes['world_size']} ranks,"
            f" this run has {ranks.world_size()}; start as many, or convert it with ds_to_universal"
        )
    before, now = checkpoint.notes["trajectory"], json.loads(json.dumps(settings.trajectory()))
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"--resume: the run in {settings.out} had {name} = {before.get(name)!r},"
                f" this one has {now[name]!r};"
                f" give the same {name}, or another --out"
            )
