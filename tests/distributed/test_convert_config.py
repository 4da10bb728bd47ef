"""The JSONs that people have train after ``ds-optim convert-config``, "auto" filled in as their trainer does."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import ds_optim
from ds_optim.cli.app import main
from tests.shipped import AUTO, SHIPPED
from tests.tiers import cells

from .harness import device, run_ranks
from .models import WIDTH, TinyNet, batch, share
from .small_runs import quiet

STEPS = 3
LEARNING_RATE = 1e-2
TRAINED = cells(["llama-factory z2", "axolotl zero3_bf16_cpuoffload_all", "ms-swift zero2_offload"], SHIPPED)
_TRAINERS: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
    "fp16.enabled": False,
    "optimizer.params.lr": LEARNING_RATE,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.params.total_num_steps": 10,
    "scheduler.params.warmup_num_steps": 2,
    "zero_optimization.reduce_bucket_size": WIDTH**2,
    "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * WIDTH**2),
    "zero_optimization.stage3_param_persistence_threshold": 10 * WIDTH,
}
"""What transformers' Trainer writes for "auto", of its arguments and the model's width."""


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """The config as Trainer hands it on; sizes of buckets, which are memory that is reserved, as the model's."""
    config = copy.deepcopy(config)
    for path, value in _TRAINERS.items():
        *above, key = path.split(".")
        owner = config
        for name in above:
            owner = owner.get(name, {})
        if owner.get(key) == AUTO:
            owner[key] = value
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[key] = min(zero.get(key, math.inf), 20_000)
    return config


def three_steps(rank: int, world_size: int, folder: Path) -> dict[str, tuple[str, int, list[float]]]:
    quiet()
    found = {}
    for path in sorted(folder.glob("*.json")):
        config = filled(json.loads(path.read_text()))
        engine, _, _, _ = ds_optim.initialize(model=TinyNet().to(device()), config=config)
        losses = []
        for number in range(STEPS * engine.gradient_accumulation_steps() + 1):
            tokens, targets = share(*batch(0, 8), rank, world_size)
            loss = engine(tokens.to(device()), targets.to(device()))
            losses.append(loss.item())
            if number < STEPS * engine.gradient_accumulation_steps():
                engine.backward(loss)
                engine.step()
        stepped = type(engine.basic_optimizer).__name__
        found[path.stem] = (stepped, engine.zero_optimization_stage(), losses)
        assert engine.global_steps == STEPS
        engine.destroy()
    return found


def test_shipped_configs_train_three_steps_after_convert_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "written"
    written.mkdir()
    for name in TRAINED:
        given = tmp_path / f"{name}.json"
        given.write_text(json.dumps(SHIPPED[name]))
        with pytest.raises(SystemExit) as ended:
            main(["convert-config", str(given), "--to", "LionMuon", "--out", str(written / given.name)])
        assert ended.value.code == 0, capsys.readouterr().err
    for found in run_ranks(2, three_steps, written, timeout=300):
        assert set(found) == set(TRAINED)
        for name, (stepped, stage, losses) in found.items():
            assert stepped == "LionMuon", name
            assert stage == SHIPPED[name]["zero_optimization"]["stage"], name
            assert all(map(math.isfinite, losses)), name
            assert losses[-1] < losses[0], name
