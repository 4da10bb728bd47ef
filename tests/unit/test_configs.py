"""Every JSON in configs/ is one that DeepSpeed and ds_optim take, and trains at every stage it is for."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.job.deepspeed_json import settings_from_json
from ds_optim.job.models import build_model, preset_config
from ds_optim.job.presets import PRESETS
from ds_optim.job.settings import make_settings
from ds_optim.optimizers import OPTIMIZERS, canonical_type
from tests.cases import TYPES
from tests.distributed.harness import device, run_ranks
from tests.distributed.models import TinyNet, batch, share
from tests.tiers import cells

FOLDER = Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
YARDSTICKS = {"adamw": "AdamW", "deepspeed_muon": "deepspeed:Muon"}
OURS = {name: OPTIMIZERS[kind] for name in FILES if (kind := canonical_type(name)) in OPTIMIZERS}
# DeepSpeed drops a top-level key that it does not know without a word, so the test has to know them.
TOP_LEVEL = {
    "optimizer",
    "zero_optimization",
    "bf16",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
}
VARIANTS = [(1, "none"), (2, "none"), (3, "none"), (3, "cpu")]
TRAINED = cells(
    [("lion_muon", 3, "cpu"), ("muon", 2, "none")], [(name, *variant) for name in FILES for variant in VARIANTS]
)


def read(name: str) -> dict[str, Any]:
    config = json.loads(FILES[name].read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def at(config: dict[str, Any], stage: int, offload: str) -> dict[str, Any]:
    """The config with the two values changed that configs/README.md tells to change."""
    changed = copy.deepcopy(config)
    changed["zero_optimization"]["stage"] = stage
    changed["zero_optimization"]["offload_optimizer"]["device"] = offload
    return changed


def train(rank: int, world_size: int, config: dict[str, Any]) -> list[float]:
    # DeepSpeed's Muon is compiled, for longer than it runs here.
    torch.compiler.set_stance("force_eager")
    model = TinyNet().to(device())
    engine, _, _, _ = ds_optim.initialize(model=model, config=config)
    losses = []
    for step in range(3):
        tokens, targets = share(*batch(step % 2, 8), rank, world_size)
        loss = engine(tokens.to(device()), targets.to(device()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_there_is_one_for_each_optimizer() -> None:
    assert set(FILES) == set(OURS) | set(YARDSTICKS)
    assert {cls.__name__ for cls in OURS.values()} == set(TYPES)


@pytest.mark.parametrize("name", FILES)
def test_keys_are_known_to_deepspeed(name: str) -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig

    config = read(name)
    assert set(config) == TOP_LEVEL
    for key in TOP_LEVEL - {"zero_optimization"}:
        assert key in {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(config["optimizer"]) == {"type", "params"}
    # raises on an unknown key inside a section
    understood = DeepSpeedConfig({**config, "optimizer": {"type": "AdamW", "params": {}}})
    assert understood.gradient_clipping == config["gradient_clipping"]
    assert understood.zero_config.stage == config["zero_optimization"]["stage"]


@pytest.mark.parametrize("name", OURS)
def test_from_config_builds_what_the_file_says(name: str) -> None:
    config = read(name)
    optimizer, rest = ds_optim.from_config(TinyNet(), FILES[name])
    assert type(optimizer) is OURS[name]
    assert "optimizer" not in rest
    params = config["optimizer"]["params"]
    share = params["lr"] / params["sign_lr_ratio"] if "sign_lr_ratio" in params else 1e-4
    aux = params.get("aux_lr", share) if optimizer.has_aux else params["lr"]
    rates = [params["lr"] if group["role"] == "matrix" else aux for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert params["weight_decay"] in [group["weight_decay"] for group in optimizer.param_groups]


def test_the_whole_config_of_the_docs_fits_the_preset_that_it_names() -> None:
    page = (FOLDER.parent / "docs" / "from-adamw.md").read_text(encoding="utf-8")
    section = page.partition("## A whole config")[2].partition("\n## ")[0]
    config = json.loads(section.partition("```json")[2].partition("```")[0])
    preset = next(name for name in PRESETS if f"`{name}`" in section)
    with torch.device("meta"):
        model = build_model(preset_config(preset, PRESETS[preset].vocab_size or 257, 8), 0)
    optimizer, rest = ds_optim.from_config(model, config)
    assert isinstance(optimizer, ds_optim.LionMuon)
    viewed = {m.spec.name: m.view for members in optimizer.members for m in members if m.view is not None}
    assert {name for name, view in viewed.items() if view.matrices()[0][0] == 12} == {
        f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in range(12) for which in "qk"
    }
    assert make_settings(**settings_from_json(config, {"preset": preset})).stage == 3
    assert "optimizer" not in rest


@pytest.mark.parametrize("name", FILES)
def test_types_are_the_ones_meant(name: str) -> None:
    meant = YARDSTICKS.get(name) or OURS[name].__name__
    assert read(name)["optimizer"]["type"] == meant


@pytest.mark.parametrize(("name", "stage", "offload"), TRAINED)
def test_trains_at_every_stage(name: str, stage: int, offload: str) -> None:
    config = at(read(name), stage, offload)
    config["train_micro_batch_size_per_gpu"] = 4
    first, second = run_ranks(2, train, config)
    assert all(math.isfinite(loss) for loss in first + second)
    assert (first[2], second[2]) != (first[0], second[0]), "the weights did not move"
