"""A run that goes on with other ranks, or at another stage, than its checkpoint: cut anew on the way in.

What is cut lies beside the run's checkpoints until it is loaded; they stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ds_optim.errors import UserError
from ds_optim.job.deepspeed_json import data_ranks, deepspeed_config
from ds_optim.job.settings import TrainSettings
from ds_optim.survival.reshard_seal import seal_like, sealed_notes
from ds_optim.zero.checkpoints.load import take_away
from ds_optim.zero.checkpoints.reshard import reshard

_FOLDER = "checkpoints.recut"


class Shape(NamedTuple):
    """How many ranks, and at which ZeRO stage."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} at stage {self.stage}"


def place(settings: TrainSettings) -> Path:
    """Where what is cut lies."""
    assert settings.out is not None
    return settings.out / _FOLDER


def write(folder: Path, settings: TrainSettings, shape: Shape) -> None:
    """Cut the checkpoint in ``folder`` for a run of ``shape``, verified and sealed. One process.

    Raises:
        UserError: it cannot have that shape, or what is cut cannot be written.
    """
    try:
        reshard(
            folder,
            place(settings),
            ranks=shape.ranks,
            stage=shape.stage,
            config=deepspeed_config(settings, shape.ranks),
            seal=seal_like(sealed_notes(folder)),
        )
    except UserError as problem:
        raise UserError(f"--resume, {folder} for {shape}: {problem}") from None


def forget(settings: TrainSettings) -> None:
    """Take away what was cut, for this start or by one that a kill ended. One process."""
    take_away(place(settings))


def line(step: int, was: Shape, shape: Shape, settings: TrainSettings) -> str:
    """What is to be said of it."""
    batch = settings.micro_batch * settings.accumulation * data_ranks(settings.deepspeed, shape.ranks)
    return f"the checkpoint of step {step} is of {was}: cut anew for {shape}, {batch} sequences a step"
