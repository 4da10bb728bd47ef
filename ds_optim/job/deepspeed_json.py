"""Between the run's settings and a DeepSpeed JSON, both ways."""

from __future__ import annotations

import copy
from typing import Any

from ds_optim.errors import UserError
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.zero.auto import AUTO, at, batch_sizes, is_open
from ds_optim.zero.refused import SEQUENCE
from ds_optim.zero.support import sequences_cut_in, tensor_parallel_size
from ds_optim.zero.values import understood

# Keys of the JSON that a setting takes over: (path in the JSON, setting).
_SHARED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("train_micro_batch_size_per_gpu",), "micro_batch"),
    (("gradient_accumulation_steps",), "accumulation"),
    (("gradient_clipping",), "clip"),
    (("zero_optimization", "stage"), "stage"),
)


def settings_from_json(config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of a DeepSpeed JSON under the flags, which win; ``auto`` leaves a setting to the flags.

    Raises ``UserError`` for what DeepSpeed would refuse or misread, and where the optimizer stands in both.
    """
    given = copy.deepcopy(config)
    if "stage" in flags:  # what DeepSpeed asks of the other settings depends on it
        given["zero_optimization"] = {**section_of(given, "zero_optimization"), "stage": flags["stage"]}
    given = understood(given)
    config = copy.deepcopy(given)
    # What a JSON does not say means what DeepSpeed means by it.
    found: dict[str, Any] = {"stage": 0, **_dtype(config)}
    for path, setting in _SHARED:
        value = _take(config, path)
        if value == AUTO:
            found.pop(setting, None)
        elif value is not None:
            found[setting] = value
    found |= _batch(given, flags)
    optimizer = config.pop("optimizer", None)
    if optimizer is not None:
        if "optimizer" in flags or "optimizer_params" in flags:
            raise UserError("the optimizer stands in --optimizer and in --config; keep one of them")
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
            raise UserError('"optimizer" in --config needs a "type", such as {"type": "LionMuon", "params": {}}')
        found["optimizer"] = optimizer["type"]
        params = optimizer.get("params", {})
        if not isinstance(params, dict):
            raise UserError(f'"optimizer": {{"params": …}} in --config is {params!r}: write an object of parameters')
        found["optimizer_params"] = {
            name: value for name, value in params.items() if not is_open(f"optimizer.params.{name}", value)
        }
        found["tuned"] = False  # a JSON that names its optimizer means what it says, and that alone
    if "scheduler" in config:
        raise UserError('"scheduler" in --config: train has its own warmup and cosine; take it out and set --warmup')
    return {**found, **flags, "deepspeed": config}


def _batch(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, int]:
    """Micro-batch and accumulation of a JSON that gives the global batch, as DeepSpeed derives them."""
    if given.get("train_batch_size") in (None, AUTO):
        return {}
    own = {path[0]: flags[setting] for path, setting in _SHARED if len(path) == 1 and setting in flags}
    _, micro, accumulation = batch_sizes({**given, **own}, data_ranks(given, ranks.expected()))
    return {"micro_batch": micro, "accumulation": accumulation}


def _dtype(config: dict[str, Any]) -> dict[str, str]:
    """What the switches for 16-bit weights say; nothing where they leave it to the flags."""
    if config.get("bf16") is None and "bfloat16" in config:  # its old name, which DeepSpeed still reads
        config["bf16"] = config.pop("bfloat16")
    switches = {name: at(config, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, value in switches.items() if value is True]
    return {"dtype": on[0]} if on else {} if AUTO in switches.values() else {"dtype": "fp32"}


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: the user's JSON with the settings written over it."""
    config = copy.deepcopy(settings.deepspeed)
    config["train_micro_batch_size_per_gpu"] = settings.micro_batch
    config["gradient_accumulation_steps"] = settings.accumulation
    batch_sizes(config, data_ranks(config, world_size))
    config.pop("train_batch_size", None)
    config["gradient_clipping"] = settings.clip
    config["zero_optimization"] = {**section_of(config, "zero_optimization"), "stage": settings.stage}
    for name in ("bf16", "fp16"):
        config[name] = {**section_of(config, name), "enabled": settings.dtype == name}
    config["optimizer"] = {"type": settings.optimizer, "params": settings.resolved_params()}
    config.setdefault("steps_per_print", 10**9)
    if settings.tensorboard and settings.out is not None:
        config["tensorboard"] = {"enabled": True, "output_path": str(settings.out), "job_name": "tensorboard"}
    return config


def data_ranks(config: dict[str, Any], world_size: int) -> int:
    """Of so many ranks how many have a batch of their own: those that hold shards of one model by AutoTP, or share its
    sequences, have one together.

    Raises:
        UserError: they are no whole number.
    """
    left = world_size
    for name, size in (
        ("tensor_parallel.autotp_size", tensor_parallel_size(config)),
        (SEQUENCE, sequences_cut_in(config) or 1),
    ):
        if left % size:
            raise UserError(
                f"{name} is {size}, which does not divide {world_size} rank(s): write a divisor, or start as many "
                "ranks as a multiple of it"
            )
        left //= size
    return left


def section_of(config: dict[str, Any], key: str) -> dict[str, Any]:
    """An object of settings, empty where none is given; raises ``UserError`` for anything else."""
    section = config.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{key} is {section!r}: write an object of settings, or leave it out")
    return section or {}


def _take(config: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Remove and return the value at ``path``; None where it is missing."""
    section: Any = config
    for key in path[:-1]:
        section = section.get(key)
        if not isinstance(section, dict):
            return None
    return section.pop(path[-1], None)
