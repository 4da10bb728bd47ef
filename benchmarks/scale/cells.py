"""The cells of the curves: what is stepped, and the processor time of a step of it.

Processor time of the ranks' calling threads, which neither waits for messages nor other programs are part of: what
grows faster than its work shows whatever the machine does beside.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.small_matrices import engine_of, own_step
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings
from ds_optim.memory.simulate import Simulated, simulate

ITERATIONS = 5
"""Of Newton-Schulz on an n x 2n matrix: two products of 4 n³ operations each, and one of 2 n³."""
TRAINED = ("AdamW", "Lion", "Muon")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A step at stage 3: ``matrices`` equal ones of ``rows`` x twice as many columns, on so many ranks."""

    axis: str
    matrices: int
    rows: int
    ranks: int

    @property
    def parameters(self) -> int:
        return 2 * self.rows**2 * self.matrices

    def work(self, case: str) -> float:
        """What a step's arithmetic grows with: elements, and for Muon the operations of its products, in Gflop."""
        if case != "Muon":
            return self.parameters / 1e9
        return self.matrices * ITERATIONS * 10 * self.rows**3 / 1e9


def grid(parameters: tuple[float, ...], tensors: tuple[int, ...], ranks: tuple[int, ...]) -> list[Cell]:
    """One axis at a time, from 48 tensors, 8 million parameters and two ranks."""
    cells = [_cell("parameters", 48, count * 1e6, 2) for count in parameters]
    cells += [_cell("tensors", count, 8e6, 2) for count in tensors]
    return cells + [replace(_cell("ranks", 48, 8e6, 2), ranks=count) for count in ranks]


def _cell(axis: str, matrices: int, parameters: float, ranks: int) -> Cell:
    rows = max(4, 4 * round((parameters / matrices / 2) ** 0.5 / 4))
    return Cell(axis=axis, matrices=matrices, rows=rows, ranks=ranks)


def measure(rank: int, world_size: int, cell: Cell, case: str, rounds: int) -> dict[str, float]:
    """Milliseconds of this rank's processor in an optimizer's step, the median, and in the first.

    In processes of its own: DeepSpeed 0.19 keeps a destroyed engine, and three of 300M parameters do not fit here.
    """
    engine = engine_of(case, cell.matrices, (cell.rows, 2 * cell.rows))
    engine.scale = 2 * cell.rows
    first = own_step(engine)
    return {"ms": 1e3 * median(own_step(engine) for _ in range(rounds)), "first_ms": 1e3 * first}


def simulated(model: Path, ranks: int, stage: int) -> tuple[Simulated, float]:
    """Muon's exchange on a cluster that is not there, and the processor seconds that laying it out takes."""
    shape = load_shape(str(model), None)
    plan = plan_optimizer(shape, "muon", {}, weights=TORCH_DTYPES["bf16"])
    begin = time.process_time()
    found = simulate(shape, plan, ZeroSettings(stage=stage, ranks=ranks, dtype="bf16"))
    return found, time.process_time() - begin


def row_of(cell: Cell, case: str, by_rank: list[dict[str, float]]) -> dict[str, Any]:
    """What is kept of a cell: the slowest rank's milliseconds, and all ranks' together."""
    times = [found["ms"] for found in by_rank]
    return {
        "axis": cell.axis, "matrices": cell.matrices, "shape": f"{cell.rows}x{2 * cell.rows}",
        "parameters": cell.parameters, "work": cell.work(case), "ms": round(max(times), 3),
        "all_ranks_ms": round(sum(times), 3), "first_ms": round(max(f["first_ms"] for f in by_rank), 2),
    }  # fmt: skip
