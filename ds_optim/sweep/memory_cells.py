"""What ``ds-optim memory`` runs: its settings, and the cells that they make."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from ds_optim.sweep.cells import Cell, CompareSettings, plan_cells
from ds_optim.sweep.memory_measure import FIRST_STEADY_STEP


class MemorySettings(CompareSettings):
    """One sweep: each optimizer and momentum dtype at each stage, ``repeat`` fresh process groups each.

    steady: steps of a run whose peak is taken. snapshot: keep the CUDA allocator's history of each rank.
    """

    steps: int = Field(0, ge=0, description="follows from steady")
    eval_batches: int | None = 1
    repeat: int = Field(3, ge=1)
    steady: int = Field(3, ge=1)
    snapshot: bool = False

    @model_validator(mode="after")
    def _has_what_it_asks_for(self) -> MemorySettings:
        if self.snapshot and not torch.cuda.is_available():
            raise ValueError("snapshot is the CUDA allocator's history, and there is no CUDA device: leave it out")
        return self


def plan_memory(settings: MemorySettings) -> list[Cell]:
    """The cells in the order in which they run; the steady steps come third, the one that is counted last."""
    steps = FIRST_STEADY_STEP + settings.steady
    return plan_cells(settings.model_copy(update={"steps": steps}))
