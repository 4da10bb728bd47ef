"""A run goes on with other ranks, or at another stage, in one command: as after a reshard by hand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.job.results import TrainResult
from ds_optim.job.settings import make_settings
from ds_optim.survival import recut
from ds_optim.survival.reshard_seal import seal_like, sealed_notes
from ds_optim.train.loop import train
from ds_optim.zero.checkpoints import reshard
from tests import tiers
from tests.distributed.harness import run_ranks

from .survival import STEPS, log_of, tiny

INT8 = {
    "optimizer": "lion_muon",
    "optimizer_params": {"lr": 1e-3, "period": 2, "momentum_dtype": "int8", "polar": {"dtype": "float32"}},
}
SEQUENCES = 6
Shape = tuple[int, int]
#: From ranks and stage to others, and whether the arithmetic is the same to the bit.
CELLS: list[tuple[Shape, Shape, bool]] = tiers.cells(
    [((2, 2), (3, 3), False)],
    [((2, 1), (2, 3), True), ((3, 3), (1, 1), False), ((2, 3), (2, 0), False)],
)


def run(rank: int, world_size: int, folder: Path, changed: dict[str, Any]) -> TrainResult | str:
    os.chdir(folder)
    micro = SEQUENCES // world_size
    try:
        return train(make_settings(**tiny(**{"micro_batch": micro, "save_every": 3, "keep": 0, **INT8, **changed})))
    except UserError as error:
        return str(error)


def first_half(place: Path, shape: Shape) -> list[float]:
    """Leave ``out`` as a run leaves it that ended after its third step; the losses of one that went on."""
    ranks, stage = shape
    whole = run_ranks(ranks, run, place, {"stage": stage, "out": "out"})[0]
    assert isinstance(whole, TrainResult)
    shutil.rmtree(place / f"out/checkpoints/step-{STEPS}")
    return whole.losses


@pytest.mark.parametrize(("before", "after", "same"), CELLS, ids=str)
def test_the_next_losses_are_those_after_a_reshard(place: Path, before: Shape, after: Shape, same: bool) -> None:
    losses = first_half(place, before)
    ranks, stage = after
    source = place / "out/checkpoints/step-3"
    shutil.copytree(place / "out", place / "by_hand")
    shutil.rmtree(place / "by_hand/checkpoints")
    seal = seal_like(sealed_notes(source))
    config = {"zero_optimization": {"stage": stage}}
    reshard(source, place / "by_hand/checkpoints", ranks=ranks, stage=stage, seal=seal, config=config)
    by_hand, at_once = (
        run_ranks(ranks, run, place, {"stage": stage, "out": out, "resume": True})[0] for out in ("by_hand", "out")
    )
    assert isinstance(by_hand, TrainResult)
    assert isinstance(at_once, TrainResult)
    assert at_once.losses == by_hand.losses
    assert len(at_once.losses) == STEPS - 3
    assert at_once.val_loss == by_hand.val_loss
    # int8 is quantized anew where partitions are cut elsewhere.
    assert at_once.losses == pytest.approx(losses[3:], rel=1e-6 if same else 1e-2)
    # What was cut is gone, and the run's own checkpoint is as it was.
    assert sorted(path.name for path in (place / "out").glob("checkpoints*")) == ["checkpoints"]
    assert sorted(path.name for path in (place / "out/checkpoints").glob("step-*")) == ["step-3", f"step-{STEPS}"]
    notes = sealed_notes(source)
    assert notes is not None
    assert notes["world_size"] == before[0]
    assert [line["step"] for line in log_of(place / "out") if "loss" in line] == [*range(1, STEPS + 1)]


@pytest.mark.full
def test_shards_are_cut_anew_for_other_data_parallel_ranks(place: Path) -> None:
    """Four ranks of which two have the shards of a model, then two."""
    shards = {"out": "out", "deepspeed": {"tensor_parallel": {"autotp_size": 2}}, "model": None, "preset": "qwen3-tiny"}
    whole = run_ranks(4, run, place, {**shards, "micro_batch": 2, "stage": 1})[0]
    assert isinstance(whole, TrainResult)
    shutil.rmtree(place / f"out/checkpoints/step-{STEPS}")
    resumed = run_ranks(2, run, place, {**shards, "micro_batch": 4, "stage": 3, "resume": True})[0]
    assert isinstance(resumed, TrainResult)
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-2)
    said = recut.line(3, recut.Shape(4, 1), recut.Shape(2, 3), make_settings(**tiny(**shards, micro_batch=4)))
    assert said.endswith("is of 4 ranks at stage 1: cut anew for 2 ranks at stage 3, 4 sequences a step")


@pytest.mark.full
def test_another_batch_or_optimizer_is_refused_before_anything_is_cut(place: Path) -> None:
    first_half(place, (2, 2))
    left = place / "out/checkpoints.recut"  # by a start that was killed
    (left / "step-3").mkdir(parents=True)
    batch, rate = (
        run_ranks(3, run, place, {"stage": 3, "out": "out", "resume": True, **changed})[0]
        for changed in ({"micro_batch": 3}, {"optimizer_params": {**INT8["optimizer_params"], "lr": 2e-3}})  # type: ignore[dict-item]
    )
    assert "had micro_batch = 2, this one has 3" in str(batch)
    assert "had optimizer_params" in str(rate)
    assert not left.exists()
