"""Slices of a flat partition are stepped together where kernels can: no call a slice, and the bits of such calls."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from ds_optim.elementwise import native
from ds_optim.optimizers import at_once
from ds_optim.optimizers.local import Local
from tests.tiers import cells

from .harness import run_ranks
from .small_runs import Cell, differences, one_step, snapshot, start

INT8 = {"momentum_dtype": "int8"}
STEPPED: dict[str, dict[str, Any]] = {
    "rows come back, signs of int8 momentum": {"type": "NorMuon", "params": {**INT8, "aux": "lion"}},
    "scales": {"type": "Muonlight", "params": {"momentum_dtype": "bfloat16"}},
    "weights go along": {"type": "MuonH", "params": {}},
    "signs of what comes back": {"type": "SpectralLion", "params": INT8},
}
CELLS = [*((name, 3, "bf16") for name in STEPPED), (next(iter(STEPPED)), 1, "fp32")]


def both_ways(rank: int, world_size: int, name: str, stage: int, dtype: str) -> tuple[list[str], list[int]]:
    """What differs after two steps; how many slices were looked at one by one in the last, together and not."""
    left, looked_at = [], []
    for together in (True, False):
        with mock.patch.object(at_once, "can", at_once.can if together else lambda local: False):
            engine = start(Cell(stage=stage, dtype=dtype), world_size, STEPPED[name])
            for step in range(2):
                with mock.patch.object(Local, "piece", autospec=True, side_effect=Local.piece) as piece:
                    one_step(engine, step, rank, world_size)
            looked_at.append(piece.call_count)
            left.append(snapshot(engine))
            engine.destroy()
    return differences(*left), looked_at


@pytest.mark.skipif(not native.is_available() or torch.cuda.is_available(), reason="compiled kernels of a CPU")
@pytest.mark.parametrize(("name", "stage", "dtype"), cells(CELLS[:1], CELLS))
def test_slices_go_together_to_the_same_bits(name: str, stage: int, dtype: str) -> None:
    for changed, (together, alone) in run_ranks(2, both_ways, name, stage, dtype):
        assert changed == []
        assert together == 0
        assert alone > 0
