"""Where ``ds-optim estimate`` takes a model from: a preset, a ``transformers`` config, a parameter list, a count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.memory.estimate_model import ModelShape, shape_of_count, shape_of_list, shape_of_module
from ds_optim.train.models import build_model, model_config, preset_config
from ds_optim.train.presets import PRESETS
from ds_optim.train.settings import did_you_mean
from ds_optim.zero.support import uses_bf16_masters

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
}
_SWITCHES = ("overlap_comm", "contiguous_gradients")
#: Tokens of the tokenizer that presets without a vocabulary of their own take.
BYTES_VOCABULARY = 257


def load_shape(model: str | None, params: float | None, seq_len: int = 1024) -> ModelShape:
    """The model that the command names: one of ``model`` and ``params``.

    Args:
        model: a preset, a folder or ``config.json`` of ``transformers``, a hub name "owner/model", or a JSON file with
            a list of parameters.
        params: a number of parameters, of a model that is not known otherwise.

    Raises:
        UserError: there is no such model, or both or none are given.
    """
    if (model is None) == (params is None):
        raise UserError("give --model (a preset, a config, a parameter list) or --params (a number), one of the two")
    if params is not None:
        return shape_of_count(params)
    assert model is not None
    if model in PRESETS:
        return _of_config(model, preset_config(model, PRESETS[model].vocab_size or BYTES_VOCABULARY, seq_len))
    path = Path(model).expanduser()
    if path.is_file():
        content = _read(path)
        is_config = isinstance(content, dict) and ("model_type" in content or "architectures" in content)
        return _of_config(model, model_config(model, 1)) if is_config else shape_of_list(model, content)
    if path.is_dir() or (model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.suffix):
        return _of_config(model, model_config(model, 1))
    raise UserError(
        f"there is no model {model!r}{did_you_mean(model, PRESETS)}: write one of {', '.join(PRESETS)}, the path of a"
        " config.json or of a JSON with parameters, or a hub name"
    )


def zero_settings(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What a DeepSpeed JSON says of buckets, offload and gradients, as fields of ``ZeroSettings``.

    "auto" leaves a setting to DeepSpeed's default. Raises ``UserError`` for what DeepSpeed would not take; ``where``
    ends its line.
    """
    section = config.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        raise UserError(f'"zero_optimization"{where} is no JSON object: write {{"stage": 3}}')
    found: dict[str, Any] = {}
    for key, name in _ZERO_KEYS.items():
        value = section.get(key, "auto")
        if value == "auto" or value is None:
            continue
        is_number = isinstance(value, (int, float)) and value >= 0
        if isinstance(value, bool) != (key in _SWITCHES) or not is_number:
            raise UserError(f"{key}{where} is {value!r}: write what DeepSpeed takes there")
        found[name] = value if isinstance(value, bool) else int(value)
    offload = section.get("offload_optimizer")
    if isinstance(offload, Mapping) and offload.get("device", "none") != "none":
        found["offload"] = True
    if uses_bf16_masters(config):
        found["bf16_masters"] = True
    accumulated = config.get("data_types", {}).get("grad_accum_dtype")
    if accumulated is not None:
        found["grad_accum_dtype"] = accumulated
    return found


def _of_config(name: str, config: Any) -> ModelShape:
    with torch.device("meta"):
        return shape_of_module(name, build_model(config, 0), config=config)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: give a transformers config or a list of parameters") from None
