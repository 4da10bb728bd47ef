"""The rest of the family goes on from a checkpoint bit for bit, and its diagnostics are those of whole parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.lion_muon import is_spectral
from ds_optim.optimizers.updates import ParameterUpdate
from tests.cases import CASES, WITH_VARIANTS, update_of

from .harness import run_ranks
from .models import TinyNet
from .small_runs import Cell, differences, local_tensors, one_step, own_optimizer, snapshot, start
from .training import Run, random_gradients, train_plain, train_sharded

BEFORE, AFTER = 3, 2
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
SPECTRAL_FIRST_AND_LAST = 14


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": 1e-2, **params}}


# name -> (the optimizer, the stages at which it is resumed): one of each way to keep something. (test_resume_matrix.py:
# every optimizer, at one place each.)
RESUMED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "StoSignSGD": (optimizer("StoSignSGD", seed=3), (0, 1, 3)),
    "LASM": (optimizer("LASM"), (0, 2, 3)),
    "MiMuon": (optimizer("MiMuon", tau=0.02, **FP32), (0, 2, 3)),
    "SpectralLion gradient": (optimizer("SpectralLion", basis="gradient", momentum_dtype="int8"), (0, 1, 3)),
    "Lamb": (optimizer("Lamb"), (0, 1, 3)),
    # Of five steps this seed makes the first and the last spectral: a count that starts anew would be seen.
    "LionMuon random": (
        optimizer("LionMuon", period_mode="random", seed=SPECTRAL_FIRST_AND_LAST, **FP32),
        (0, 1, 2, 3),
    ),
}
CELLS = {
    **{f"{name} z{stage}": (Cell(stage=stage), o) for name, (o, stages) in RESUMED.items() for stage in stages},
    "LASM z3 sub-groups": (Cell(stage=3, zero={"sub_group_size": 300}), RESUMED["LASM"][0]),
    "StoSignSGD z1 bf16": (Cell(stage=1, dtype="bf16"), RESUMED["StoSignSGD"][0]),
    "Lamb z0 bf16": (Cell(stage=0, dtype="bf16"), RESUMED["Lamb"][0]),
}
SCALARS = [label for label in CELLS if label.startswith(("StoSignSGD z", "LASM"))]


def train(engine: Any, steps: range, rank: int, world_size: int) -> dict[str, Any]:
    """All that this rank holds after these steps; later ones do not change it."""
    for step in steps:
        one_step(engine, step, rank, world_size)
    return copy.deepcopy(snapshot(engine))


def resume(cell: Cell, chosen: Mapping[str, Any], world_size: int, place: str) -> Any:
    """An engine that starts from other weights and has loaded the checkpoint."""
    model = TinyNet(seed=9).to(torch.bfloat16 if cell.dtype == "bf16" else torch.float32)
    engine = start(cell, world_size, chosen, model)
    engine.load_checkpoint(place)
    return engine


def scalars_of(engine: Any) -> dict[str, float]:
    state = own_optimizer(engine).state
    return {name: v for t in local_tensors(engine) for name, v in state[t].get("scalars", {}).items()}


def saved_and_resumed(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every cell, what differs bit for bit from the run that was never stopped, and the numbers it keeps."""
    found = {}
    for number, (label, (cell, chosen)) in enumerate(CELLS.items()):
        place = str(folder / str(number))
        engine = start(cell, world_size, chosen)
        at_save = train(engine, range(BEFORE), rank, world_size)
        engine.save_checkpoint(place)
        kept = dict(scalars_of(engine))
        uninterrupted = train(engine, range(BEFORE, BEFORE + AFTER), rank, world_size)
        engine.destroy()
        resumed = resume(cell, chosen, world_size, place)
        loaded = copy.deepcopy(snapshot(resumed))
        found[label] = {
            "moved": bool(differences(at_save, uninterrupted)),
            "loaded": differences(at_save, loaded),
            "scalars": kept,
            "same scalars": scalars_of(resumed) == kept,
            "resumed": differences(uninterrupted, train(resumed, range(BEFORE, BEFORE + AFTER), rank, world_size)),
        }
        if label in SCALARS:
            found[label]["without"] = without_scalars(cell, chosen, rank, world_size, place, uninterrupted)
        resumed.destroy()
    return found


def without_scalars(
    cell: Cell, chosen: Mapping[str, Any], rank: int, world_size: int, place: str, expected: Mapping[str, Any]
) -> list[str]:
    """What differs, the numbers themselves left aside, where they are not those of the checkpoint."""
    engine = resume(cell, chosen, world_size, place)
    for tensor in local_tensors(engine):
        kept = own_optimizer(engine).state[tensor]["scalars"]
        kept.update({name: 100 * value for name, value in kept.items()})
    found = differences(expected, train(engine, range(BEFORE, BEFORE + AFTER), rank, world_size))
    engine.destroy()
    return [name for name in found if not name.startswith("scalars")]


@cache
def resumed_cells(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, saved_and_resumed, folder, timeout=400)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Of both ranks."""
    return resumed_cells(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.full
@pytest.mark.parametrize("label", CELLS)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(label: str, cells: list[dict[str, dict[str, Any]]]) -> None:
    for rank, found in enumerate(cells):
        facts = {key: found[label][key] for key in ("moved", "loaded", "resumed", "same scalars")}
        assert facts == {"moved": True, "loaded": [], "resumed": [], "same scalars": True}, rank


@pytest.mark.full
@pytest.mark.parametrize("label", SCALARS)
def test_numbers_of_whole_parameters_are_in_the_checkpoint(label: str, cells: list[dict[str, dict[str, Any]]]) -> None:
    """One a parameter, above 0, by name, and the steps that follow lean on it."""
    names = {name for name, _ in TinyNet().named_parameters()}
    for found in cells:
        assert set(found[label]["scalars"]) == names
        assert min(found[label]["scalars"].values()) > 0
        assert any(key.startswith(("master", "exp_avg")) for key in found[label]["without"])
    # The same on all ranks, whoever holds a slice.
    assert cells[0][label]["scalars"] == cells[1][label]["scalars"]


def test_a_resumed_phase_is_told_from_one_that_starts_anew() -> None:
    phases = [is_spectral(step, 2, "random", SPECTRAL_FIRST_AND_LAST) for step in range(BEFORE + AFTER)]
    assert phases[BEFORE:] != phases[:AFTER]


# ------------------------------------------------------------------------------------- diagnostics under ZeRO

# Every rule that tells of whole parameters, with gates and ratios of which some are open and some are not.
TOLD = [name for name, case in CASES.items() if isinstance(update_of(case, 0), ParameterUpdate)]
WATCHED = {
    name: Run(type=WITH_VARIANTS[name].type, params={**WITH_VARIANTS[name].params, "lr": 1e-2})
    for name in (*TOLD, "Lion", "MiMuon-some_closed", "MiMuon-gap")
}
WATCHED["StableLion"] = Run(type="StableLion", params={"lr": 1e-2, "trust_ratio_max": 0.2})
PLACES: dict[str, tuple[int, dict[str, int]]] = {
    "z1": (1, {}),
    "z3": (3, {}),
    "z3-sub_groups": (3, {"sub_group_size": 300}),
}
PLACED = [("z1", 2), ("z3", 2), ("z3-sub_groups", 2), ("z1", 3), ("z3", 3)]


def watched(run: Run) -> Run:
    return replace(run, steps=3, params={**run.params, "diagnostics": True})


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer.diagnostics


def watch_sharded(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, run in WATCHED.items():
        for place in (place for place, size in PLACED if size == world_size):
            stage, zero = PLACES[place]
            placed = replace(watched(run), stage=stage, zero=zero)
            found[f"{name} {place}"] = numbers_of(train_sharded(placed, rank, world_size, random_gradients).optimizer)
    return found


@cache
def under_zero(world_size: int) -> list[dict[str, dict[str, float]]]:
    """Of every rank."""
    return run_ranks(world_size, watch_sharded, timeout=300)


def watch_plain(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    return {name: numbers_of(train_plain(watched(run), random_gradients).optimizer) for name, run in WATCHED.items()}


@cache
def unsharded() -> dict[str, dict[str, float]]:
    return run_ranks(1, watch_plain, init=False)[0]


@pytest.mark.full
@pytest.mark.parametrize(("place", "world_size"), PLACED)
@pytest.mark.parametrize("name", WATCHED)
def test_diagnostics_are_those_of_the_unsharded_run(name: str, place: str, world_size: int) -> None:
    """On every rank, though each holds but slices."""
    expected = unsharded()[name]
    assert expected
    for found in under_zero(world_size):
        assert found[f"{name} {place}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.full
def test_the_numbers_compared_are_of_some_parameters_and_not_of_others() -> None:
    """A share that is 0 or 1 would be so of any slice."""
    for name, what in [
        ("StableLion", "saturated trust ratios"),
        ("CLion-tensor", "open gates"),
        ("MiMuon-some_closed", "open gates"),
        ("MiMuon-gap", "open gates"),
        ("CLion", "open gates"),
    ]:
        assert 0 < unsharded()[name][f"matrix/{what}"] < 1, name
