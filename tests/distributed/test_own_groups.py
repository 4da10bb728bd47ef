"""Groups of a user's own, several of one role: saved, loaded, made universal and resharded with their rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim.zero.checkpoints import reshard

from .harness import run_ranks
from .models import TinyNet
from .resharding import gathered, held
from .small_runs import Cell, bits, one_step, own_optimizer, quiet
from .test_universal import to_universal

pytestmark = pytest.mark.full

STEPS = 2
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2, "warmup_type": "linear"}}
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
RATES = {"layer 0": 1e-2, "layer 1": 5e-3, "embedding": 2e-3, "aux": 1e-3, "vector": 1e-3}


def own_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Layer-wise decay, and an embedding's own rate."""
    matrix, aux, vector = ds_optim.param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    embedding = [p for p in aux["params"] if names[id(p)] == "embed.weight"]
    return [
        {"params": matrix["params"][:2], "name": "layer 0"},
        {**matrix, "params": matrix["params"][2:], "name": "layer 1", "lr": 5e-3, "betas": (0.8, 0.9)},
        {"params": embedding, "name": "embedding", "lr": 2e-3, "weight_decay": 0.5},
        {**aux, "params": [p for p in aux["params"] if p is not embedding[0]]},
        vector,
    ]


def start(cell: Cell, world_size: int, seed: int = 0) -> Any:
    import deepspeed

    quiet()
    model = TinyNet(seed=seed)
    optimizer = ds_optim.LionMuon(own_groups(model), lr=1e-2, **FP32)  # type: ignore[arg-type]
    config = {**cell.json(world_size), "zero_allow_untested_optimizer": True, "scheduler": WARMUP}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


Seen = dict[str, Any]


def look(engine: Any, cell: Cell, rank: int, world_size: int) -> Seen:
    """What is held and stands in the groups now, and what is held two steps later."""
    now = held(engine, cell, rank, world_size)
    for step in range(STEPS, 2 * STEPS):
        one_step(engine, step, rank, world_size)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in own_optimizer(engine).param_groups]
    return {"now": now, "groups": groups, "after": held(engine, cell, rank, world_size)}


def saved(rank: int, world_size: int, folder: Path) -> dict[int, Seen]:
    found = {}
    for stage in (2, 3):
        cell = Cell(stage=stage)
        engine = start(cell, world_size)
        for step in range(STEPS):
            one_step(engine, step, rank, world_size)
        engine.save_checkpoint(str(folder / str(stage)))
        found[stage] = look(engine, cell, rank, world_size)
    return found


def loaded(rank: int, world_size: int, runs: list[tuple[int, Path, bool]]) -> list[Seen]:
    found = []
    for stage, folder, universal in runs:
        cell = Cell(stage=stage, config={"checkpoint": {"load_universal": True}} if universal else {})
        engine = start(cell, world_size, seed=9)
        engine.load_checkpoint(str(folder))
        found.append(look(engine, cell, rank, world_size))
    return found


def whole(ranks: list[Seen], key: str) -> dict[tuple[str, str], Tensor]:
    return gathered(seen[key] for seen in ranks)


def test_own_groups_keep_their_rates_through_every_checkpoint(tmp_path: Path) -> None:
    """The state arrives bit for bit, and later steps, which need every group's own rate, go to the same weights."""
    before = run_ranks(2, saved, tmp_path, timeout=200)
    tag = f"global_step{STEPS}"
    runs = []
    for stage in (2, 3):
        reshard(tmp_path / str(stage), tmp_path / f"{stage} made", ranks=2, stage=5 - stage)
        runs += [(stage, tmp_path / str(stage), False), (5 - stage, tmp_path / f"{stage} made", False)]
        to_universal(tmp_path / str(stage), tag)
        runs.append((stage, tmp_path / str(stage), True))
    after = run_ranks(2, loaded, runs, timeout=200)
    for number in range(len(runs)):
        origin = [own[2 if number < 3 else 3] for own in before]
        arrived = [own[number] for own in after]
        for key, values in whole(origin, "now").items():
            assert torch.equal(bits(whole(arrived, "now")[key]), bits(values)), (runs[number], key)
        for seen in arrived:
            assert seen["groups"] == origin[0]["groups"], runs[number]
            assert {g["name"]: g["lr"] for g in seen["groups"]} == pytest.approx(RATES), runs[number]
        assert origin[0]["groups"][1]["betas"] == (0.8, 0.9)
        for key, values in whole(origin, "after").items():
            torch.testing.assert_close(whole(arrived, "after")[key], values, rtol=1e-4, atol=1e-6)
