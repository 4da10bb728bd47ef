"""A load that fails on one rank fails on all of them, in one line each, before any of them goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.errors import UserError

from .harness import run_ranks
from .small_runs import LION, LION_MUON, MUON, Cell, differences, one_step, snapshot, start
from .test_bad_input import attempt

pytestmark = pytest.mark.full

OPTIM = "{tag}/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def saved(rank: int, world_size: int, folder: Path, stages: list[int]) -> None:
    """By stage the checkpoints "two" and "three" of LionMuon, and "muon" and "lion"."""
    for stage in stages:
        for optimizer, tags in ((LION_MUON, ("one", "two", "three")), (MUON, ("muon",)), (LION, ("lion",))):
            engine = start(Cell(stage=stage), world_size, optimizer)
            for step, tag in enumerate(tags):
                one_step(engine, step, rank, world_size)
                engine.save_checkpoint(str(folder / str(stage)), tag=tag)
            engine.destroy()


def replaced(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / OPTIM.format(tag="three")).write_bytes(
        (folder / OPTIM.format(tag=name)).read_bytes()
    )


def narrow(folder: Path) -> None:
    """The momentum of rank 1 in another dtype."""
    path = folder / OPTIM.format(tag="three")
    held = torch.load(path, weights_only=False)
    for entry in _states(held["optimizer_state_dict"]):
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    torch.save(held, path)


def _states(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    inner = held.get("base_optimizer_state", held.get("optimizer_state_dict"))
    assert inner is not None
    return list(inner["state"].values())


# What happened to rank 1's file: (how, what every rank is told).
TOLD = {
    "of Muon": (replaced("muon"), "rank 1 cannot load the checkpoint, and no rank has: "),
    "of Lion": (replaced("lion"), "rank 1 cannot load the checkpoint, and no rank has: "),
    "bf16": (narrow, "rank 1 cannot load the checkpoint, and no rank has: the checkpoint's momentum is torch.bfloat16"),
    "of step 2": (
        replaced("two"),
        "the ranks disagree on the checkpoint to be loaded (step 3 on rank 0, step 2 on rank 1)",
    ),
}


def told(rank: int, world_size: int, folder: Path, stages: list[int]) -> dict[str, tuple[str, str, list[str]]]:
    """(error, line, state that was written) of a load of each damage at each stage; then a load that is whole."""
    found = {}
    for stage in stages:
        for what in (*TOLD, "nothing"):
            engine = start(Cell(stage=stage), world_size, LION_MUON)
            before = snapshot(engine)
            error, line = attempt(engine.load_checkpoint, load_dir=str(folder / f"{stage} {what}"), tag="three")
            moved = [k for k in differences(before, snapshot(engine)) if not k.startswith("model")]
            found[f"{what}, {stage}"] = error, line, moved if error else []
            engine.destroy()
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(2, saved, folder, [1, 2, 3])
    return folder


def test_what_one_rank_finds_in_its_file_is_raised_on_all(checkpoints: Path) -> None:
    stages = [1, 2, 3]
    for stage in stages:
        for what in (*TOLD, "nothing"):
            shutil.copytree(checkpoints / str(stage), checkpoints / f"{stage} {what}")
            if what in TOLD:
                TOLD[what][0](checkpoints / f"{stage} {what}")
    first, second = run_ranks(2, told, checkpoints, stages)
    assert first == second
    for stage in stages:
        assert first.pop(f"nothing, {stage}") == ("", "", [])
        for what, (_, says) in TOLD.items():
            error, line, moved = first[f"{what}, {stage}"]
            assert error == "UserError", (what, stage, line)
            assert says in line, (what, stage, line)
            assert "\n" not in line
            assert moved == [], (what, stage)


def unreadable(rank: int, world_size: int, folder: Path, stage: int) -> None:
    engine = start(Cell(stage=stage), world_size, LION_MUON)
    engine.load_checkpoint(str(folder), tag="three")
    one_step(engine, 3, rank, world_size)


@pytest.mark.parametrize(("stage", "damage"), [(1, "missing"), (2, "cut off"), (3, "missing"), (3, "cut off")])
def test_a_file_that_one_rank_cannot_read_leaves_nobody_waiting(
    checkpoints: Path, tmp_path: Path, stage: int, damage: str
) -> None:
    shutil.copytree(checkpoints / str(stage), tmp_path / "c")
    path = tmp_path / "c" / OPTIM.format(tag="three")
    os.truncate(path, 500)
    if damage == "missing":
        path.unlink()
    begin = time.monotonic()
    left, failed = run_ranks(2, unreadable, tmp_path / "c", stage, timeout=60, expect_error=True)
    assert time.monotonic() - begin < 40
    assert failed.error_type in ("FileNotFoundError", "RuntimeError"), failed
    assert left.error_type == "RuntimeError"
    assert left.message.startswith("another rank did not load its part of the checkpoint, and nothing was loaded (")


def another_try(rank: int, world_size: int, folder: Path) -> tuple[str, str]:
    """Rank 1 takes an older checkpoint where the newest cannot be read, as a script may that catches the error."""
    engine = start(Cell(stage=2), world_size, LION_MUON)
    error, line = attempt(engine.load_checkpoint, load_dir=str(folder), tag="three")
    if error not in ("", UserError.__name__):
        error, line = attempt(engine.load_checkpoint, load_dir=str(folder), tag="two")
    return error, line


def test_ranks_that_load_different_checkpoints_are_told(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "2", tmp_path / "c")
    (tmp_path / "c" / OPTIM.format(tag="three")).unlink()
    for error, line in run_ranks(2, another_try, tmp_path / "c", timeout=60):
        assert error == "UserError"
        assert "the ranks disagree on the checkpoint to be loaded (step 3 on rank 0, step 2 on rank 1)" in line
