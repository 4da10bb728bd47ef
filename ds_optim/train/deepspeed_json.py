"""Between the run's settings and a DeepSpeed JSON, both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.train.settings import TrainSettings

# Keys of the JSON that a setting takes over: (path in the JSON, setting).
_SHARED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("train_micro_batch_size_per_gpu",), "micro_batch"),
    (("gradient_accumulation_steps",), "accumulation"),
    (("gradient_clipping",), "clip"),
    (("zero_optimization", "stage"), "stage"),
)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; raises ``UserError`` where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config {str(path)!r}: {error.strerror}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; a DeepSpeed config is one")
    return value


def settings_from_json(config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of a DeepSpeed JSON under the flags, which win; ``auto`` leaves a setting to the flags.

    Raises ``UserError`` where the optimizer stands in both.
    """
    config = copy.deepcopy(config)
    found: dict[str, Any] = {}
    for path, setting in _SHARED:
        value = _take(config, path)
        if value is not None and value != "auto":
            found[setting] = value
    for name in ("bf16", "fp16"):
        section = config.get(name)
        if isinstance(section, dict) and section.get("enabled") is True:
            found["dtype"] = name
    if config and "dtype" not in found:
        found["dtype"] = "fp32"
    optimizer = config.pop("optimizer", None)
    if optimizer is not None:
        if "optimizer" in flags or "optimizer_params" in flags:
            raise UserError("the optimizer stands in --optimizer and in --config; keep one of them")
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
            raise UserError('"optimizer" in --config needs a "type", such as {"type": "LionMuon", "params": {}}')
        found["optimizer"] = optimizer["type"]
        found["optimizer_params"] = optimizer.get("params", {})
        found["tuned"] = False  # a JSON that names its optimizer means what it says, and that alone
    if "scheduler" in config:
        raise UserError('"scheduler" in --config: train has its own warmup and cosine; take it out and set --warmup')
    return {**found, **flags, "deepspeed": config}


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: the user's JSON with the settings written over it."""
    config = copy.deepcopy(settings.deepspeed)
    wanted = config.pop("train_batch_size", None)
    global_batch = settings.micro_batch * settings.accumulation * world_size
    if wanted not in (None, "auto", global_batch):
        raise UserError(
            f"train_batch_size {wanted} is not micro_batch {settings.micro_batch}"
            f" x accumulation {settings.accumulation} x {world_size} ranks = {global_batch};"
            " take it out of --config or change one of them"
        )
    config["train_micro_batch_size_per_gpu"] = settings.micro_batch
    config["gradient_accumulation_steps"] = settings.accumulation
    config["gradient_clipping"] = settings.clip
    config.setdefault("zero_optimization", {})["stage"] = settings.stage
    for name in ("bf16", "fp16"):
        section = config.setdefault(name, {})
        section["enabled"] = settings.dtype == name
    config["optimizer"] = {"type": settings.optimizer, "params": settings.resolved_params()}
    config.setdefault("steps_per_print", 10**9)
    if settings.tensorboard and settings.out is not None:
        config["tensorboard"] = {"enabled": True, "output_path": str(settings.out), "job_name": "tensorboard"}
    return config


def _take(config: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Remove and return the value at ``path``; None where it is missing."""
    section: Any = config
    for key in path[:-1]:
        section = section.get(key)
        if not isinstance(section, dict):
            return None
    return section.pop(path[-1], None)
