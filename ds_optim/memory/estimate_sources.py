"""Where ``ds-optim estimate`` takes a model from: a preset, a ``transformers`` config, a parameter list, a count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError, did_you_mean
from ds_optim.job.architectures import described_model
from ds_optim.job.deepspeed_json import section_of
from ds_optim.job.models import model_config, preset_config
from ds_optim.job.presets import PRESETS
from ds_optim.memory.estimate_model import ModelShape, shape_of_count, shape_of_list, shape_of_module
from ds_optim.zero.auto import AUTO, at, sizes_by_width
from ds_optim.zero.reading import read_json
from ds_optim.zero.refused import is_nvme, is_true
from ds_optim.zero.support import uses_autocast, uses_bf16_masters

#: Keys of a DeepSpeed JSON's ``zero_optimization`` that an estimate reads, and the settings that they are.
_ZERO_KEYS = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_model_persistence_threshold": "model_persistence_threshold",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "stage3_max_live_parameters": "max_live_parameters",
    "sub_group_size": "sub_group_size",
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "round_robin_gradients": "round_robin",
    "zero_hpz_partition_size": "hpz",
}
#: Of ``activation_checkpointing``, which acts where a model calls ``deepspeed.checkpointing``: no class of transformers
#: does.
_DEEPSPEEDS_CHECKPOINTING = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
#: Tokens of the tokenizer that presets without a vocabulary of their own take.
BYTES_VOCABULARY = 257


def load_shape(model: str | None, params: float | None, seq_len: int = 1024, *, lora: int | None = None) -> ModelShape:
    """The model that the command names: one of ``model`` and ``params``.

    Args:
        model: a preset, a folder or ``config.json`` of ``transformers`` (the class that its "architectures" names, all
            of it), a hub name "owner/model", or a JSON file with a list of parameters.
        params: a number of parameters, of a model that is not known otherwise.
        lora: rank of PEFT's LoRA on all linear layers, which are then all that is trained.

    Raises:
        UserError: there is no such model, or both or none are given; or there is no class to put LoRA into.
    """
    if lora is not None:
        return _with_lora(load_shape(model, params, seq_len), lora)
    if (model is None) == (params is None):
        raise UserError("give --model (a preset, a config, a parameter list) or --params (a number), one of the two")
    if params is not None:
        return shape_of_count(params)
    assert model is not None
    if model in PRESETS:
        return _of_config(model, preset_config(model, PRESETS[model].vocab_size or BYTES_VOCABULARY, seq_len))
    path = Path(model).expanduser()
    if path.is_file():
        content = read_json(path)
        is_config = isinstance(content, dict) and ("model_type" in content or "architectures" in content)
        return _of_config(model, model_config(model, 1)) if is_config else shape_of_list(model, content)
    if path.is_dir() or (model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.suffix):
        return _of_config(model, model_config(model, 1))
    raise UserError(
        f"there is no model {model!r}{did_you_mean(model, PRESETS)}: write one of {', '.join(PRESETS)}, the path of a"
        " config.json or of a JSON with parameters, or a hub name"
    )


def zero_settings(config: Mapping[str, Any], model: ModelShape) -> dict[str, Any]:
    """What a DeepSpeed JSON that was understood says of buckets, offload and gradients, as fields of ``ZeroSettings``.

    "auto" is what ``ds_optim.initialize`` makes of it, by the model's width, or DeepSpeed's default.
    """
    section = dict(section_of(dict(config), "zero_optimization"))
    sizes = {} if model.transformer is None else sizes_by_width(model.transformer.hidden)
    section |= {key: size for key, size in sizes.items() if section.get(key) == AUTO}
    found = {name: section[key] for key, name in _ZERO_KEYS.items() if section.get(key) not in (None, AUTO)}
    if at(section, "offload_optimizer.device") not in (None, AUTO, "none"):
        found["offload"] = True
        if is_nvme(at(section, "offload_optimizer.device")):
            found["nvme"] = True
            found["swap_buffers"] = int(at(section, "offload_optimizer.buffer_count") or 4)
    if uses_bf16_masters(config):
        found["bf16_masters"] = True
    if uses_autocast(config):
        found["autocast"] = True
        if not any(is_true(at(config, f"{section}.enabled")) for section in ("bf16", "bfloat16", "fp16")):
            found["dtype"] = "fp32"
    accumulated = at(config, "data_types.grad_accum_dtype")
    if accumulated is not None:
        found["grad_accum_dtype"] = accumulated
    return found


def unused_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a DeepSpeed JSON that was understood switches on and a model's class does not ask for."""
    keys = (f"activation_checkpointing.{key}" for key in _DEEPSPEEDS_CHECKPOINTING)
    return tuple(key for key in keys if is_true(at(config, key)))


def _of_config(name: str, config: Any) -> ModelShape:
    model, counted = described_model(config)
    return shape_of_module(name, model, config=model.config, counted=counted)


def _with_lora(shape: ModelShape, rank: int) -> ModelShape:
    """The model with PEFT's LoRA of ``rank`` on all linear layers, the rest of it frozen."""
    module, config = shape.module, getattr(shape.module, "config", None)
    if module is None or config is None:
        raise UserError(f"--lora needs a model's class, and {shape.name} is only a list of parameters: give a config")
    if rank < 1:
        raise UserError(f"--lora is {rank}: write the rank, a whole number from 1")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--lora needs PEFT: pip install peft") from None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        model = get_peft_model(module, LoraConfig(r=rank, target_modules="all-linear"))
    return shape_of_module(f"{shape.name}, LoRA of rank {rank}", model, config=config, counted=shape.counted)
