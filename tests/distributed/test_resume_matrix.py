"""Every optimizer goes on from a checkpoint bit for bit, over stages, momentum dtypes, accumulation and offload.

--full: a cell an optimizer, so chosen that every pair of (stage, dtype, momentum, accumulation, offload) occurs;
DS_OPTIM_ALL_CELLS=1 runs the product. (test_checkpoint.py looks closer at fewer of them.)
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from tests.cases import CASES, NARROW
from tests.cases import TYPES as OPTIMIZERS
from tests.tiers import ALL, FULL

from .harness import device, run_ranks
from .models import TinyNet, batch, share
from .small_runs import BATCH, OFFLOAD, Cell, differences, local_tensors, own_optimizer, snapshot, start

BEFORE, AFTER = 3, 2
"""Odd before, so that a period of 2 is resumed between its phases."""
STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
MOMENTA = ("float32", "bfloat16", "int8")
ACCUMULATIONS = (1, 3)
OFFLOADS = (False, True)


class Where(NamedTuple):
    """How an optimizer is run."""

    stage: int
    dtype: str
    momentum: str
    accumulation: int
    offload: bool


def is_possible(name: str, where: Where) -> bool:
    """Only one momentum can be narrow, and there is nothing to offload at stage 0."""
    narrow = where.momentum != "float32"
    return not (narrow and name not in NARROW) and not (where.offload and where.stage == 0)


PRODUCT = [Where(*values) for values in itertools.product(STAGES, DTYPES, MOMENTA, ACCUMULATIONS, OFFLOADS)]


def pairs(where: Where) -> set[tuple[int, Any, int, Any]]:
    return {(i, where[i], j, where[j]) for i, j in itertools.combinations(range(len(where)), 2)}


def choose() -> list[tuple[str, Where]]:
    """A cell an optimizer in which together every pair of values occurs, the same ones each time."""
    wanted = set().union(*(pairs(where) for where in PRODUCT if is_possible("Lion", where)))
    order = list(PRODUCT)
    Random(0).shuffle(order)
    chosen = []
    for name in OPTIMIZERS:
        best = max((where for where in order if is_possible(name, where)), key=lambda where: len(pairs(where) & wanted))
        chosen.append((name, best))
        wanted -= pairs(best)
    return chosen


CELLS = [(n, w) for n in OPTIMIZERS for w in PRODUCT if is_possible(n, w)] if ALL else choose()
if not FULL:  # one that keeps a mean, one with a number for each parameter, one with two values an element
    CELLS = [cell for cell in CELLS if cell[0] in ("LionMuon", "LASM", "Lamb")]


def test_the_chosen_cells_cover_every_pair() -> None:
    possible = set().union(*(pairs(where) for where in PRODUCT if is_possible("Lion", where)))
    assert set().union(*(pairs(where) for _, where in choose())) == possible
    assert {name for name, _ in choose()} == set(OPTIMIZERS)


def step_of(engine: Any, step: int, rank: int, world_size: int, accumulation: int) -> None:
    for micro in range(accumulation):
        tokens, targets = share(*batch(step, BATCH), rank, world_size, micro, accumulation)
        engine.backward(engine(tokens.to(device()), targets.to(device())))
        engine.step()


def new_engine(name: str, where: Where, world_size: int, seed: int) -> Any:
    params = {**CASES[name].params, "lr": 1e-2}
    if where.momentum != "float32":
        params["momentum_dtype"] = where.momentum
    cell = Cell(
        stage=where.stage,
        dtype=where.dtype,
        zero=OFFLOAD if where.offload else {},
        config={
            "train_micro_batch_size_per_gpu": BATCH // world_size // where.accumulation,
            "gradient_accumulation_steps": where.accumulation,
        },
    )
    kind = torch.bfloat16 if where.dtype == "bf16" else torch.float32
    return start(cell, world_size, {"type": name, "params": params}, TinyNet(seed=seed).to(device(), kind))


def go_on(rank: int, world_size: int, folder: Path, cells: list[tuple[str, Where]]) -> dict[str, dict[str, Any]]:
    """Of every cell what differs, bit for bit, from the run that was never stopped."""
    found = {}
    for number, (name, where) in enumerate(cells):
        place = str(folder / str(number))
        engine = new_engine(name, where, world_size, seed=0)
        for step in range(BEFORE):
            step_of(engine, step, rank, world_size, where.accumulation)
        engine.save_checkpoint(place)
        at_save = copy.deepcopy(snapshot(engine))
        for step in range(BEFORE, BEFORE + AFTER):
            step_of(engine, step, rank, world_size, where.accumulation)
        whole = copy.deepcopy(snapshot(engine))
        engine.destroy()
        resumed = new_engine(name, where, world_size, seed=9)
        resumed.load_checkpoint(place)
        loaded = differences(at_save, snapshot(resumed))
        state = own_optimizer(resumed).state
        names = ("exp_avg", "exp_avg_codes")
        momenta = [state[t][key] for t in local_tensors(resumed) for key in names if key in state[t]]
        kinds = {str(momentum.dtype).removeprefix("torch.") for momentum in momenta}
        for step in range(BEFORE, BEFORE + AFTER):
            step_of(resumed, step, rank, world_size, where.accumulation)
        found[f"{name} {where}"] = {
            "moved": bool(differences(at_save, whole)),
            "loaded": loaded,
            "resumed": differences(whole, snapshot(resumed)),
            "dtypes": kinds,
            "expected": {where.momentum} if CASES[name].rule.elements else set(),
        }
        resumed.destroy()
    return found


@pytest.mark.parametrize("part", range(8 if ALL else 1))
def test_every_optimizer_goes_on_from_its_checkpoint_bit_for_bit(part: int, tmp_path: Path) -> None:
    cells = CELLS[part :: 8 if ALL else 1]
    for rank, found in enumerate(run_ranks(2, go_on, tmp_path, cells, timeout=1500 if ALL else 400)):
        assert len(found) == len(cells)
        for label, facts in found.items():
            assert facts["dtypes"] == facts["expected"], f"rank {rank}, {label}"
            assert (facts["moved"], facts["loaded"], facts["resumed"]) == (True, [], []), f"rank {rank}, {label}"
