"""A DeepSpeed config's values, typed as DeepSpeed types them, and refused where it would misread them.

Most sections are pydantic models in DeepSpeed, which take "true", 1 and 2.0 for what they mean. What stands outside
of them is used as it was written: there a string "false" is true, and "1.0" no number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ds_optim.errors import UserError
from ds_optim.zero.auto import AUTO, BATCH_KEYS, at
from ds_optim.zero.complaints import complaint
from ds_optim.zero.refused import is_true

#: What is an object of settings where it is given.
OBJECTS = (
    *("zero_optimization", "bf16", "bfloat16", "fp16", "optimizer", "scheduler", "torch_autocast", "data_types"),
    *("activation_checkpointing", "checkpoint", "compile", "comms_logger", "flops_profiler", "timers", "aio"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "data_efficiency", "pipeline", "autotuning"),
    *("tensor_parallel", "expert_parallel", "hybrid_engine", "weight_quantization", "datastates_ckpt"),
)
#: Switches that DeepSpeed does not type: any string is true.
SWITCHES = (
    *("prescale_gradients", "disable_allgather", "dump_state", "disable_python_gc", "dataloader_drop_last"),
    *("wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("use_data_before_expert_parallelism", "managed_gradient_accumulation", "torch_autocast.enabled"),
    *("checkpoint.load_universal", "checkpoint.use_node_local_storage", "data_efficiency.enabled"),
    *("activation_checkpointing.partition_activations", "activation_checkpointing.cpu_checkpointing"),
    *("activation_checkpointing.contiguous_memory_optimization", "activation_checkpointing.profile"),
    *("activation_checkpointing.synchronize_checkpoint_boundary", "optimizer.legacy_fusion"),
    *("flops_profiler.enabled", "flops_profiler.detailed", "autotuning.enabled"),
)
#: Numbers that DeepSpeed does not type.
NUMBERS = ("gradient_clipping", "gradient_predivide_factor", "steps_per_print")
#: Dtypes that DeepSpeed looks at only when it builds the engine.
DTYPES = ("data_types.grad_accum_dtype", "data_types.param_dtype", "data_types.buffer_dtype", "torch_autocast.dtype")
#: Sections that this package reads, or hands on, by their typed values.
_TYPED = ("zero_optimization", "bf16", "bfloat16", "fp16")
#: Packages that DeepSpeed's monitors write with, on rank 0.
_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def understood(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as DeepSpeed understands it: the sections of ZeRO and of 16-bit weights with typed values.

    "auto" stays where somebody else may still fill it in (``ds_optim.zero.auto``). Batch sizes are not added up, as
    that needs the number of ranks.

    Raises:
        UserError: what DeepSpeed refuses, and what it would take for something else.
    """
    for key in OBJECTS:
        value = config.get(key)
        old_bool = key == "zero_optimization" and isinstance(value, bool)
        none_given = value is None and (key not in config or key in ("bf16", "bfloat16"))
        if not (isinstance(value, Mapping) or none_given or old_bool):
            raise UserError(f"{key} is {value!r}: write an object of settings, or leave it out")
    for path in SWITCHES:
        if isinstance(at(config, path), str):
            raise UserError(f"{path} is {at(config, path)!r}, which DeepSpeed takes for true: write true or false")
    _check_numbers(config)
    _check_dtypes(config)
    with _quietly():
        typed = {**config, **{key: _typed(key, config[key]) for key in _TYPED if key in config}}
        _check_whole(typed)
    return typed


def check_monitors(config: Mapping[str, Any]) -> None:
    """Refuse a monitor whose package is missing: on rank 0 alone it would end there, and leave the others waiting."""
    for section, package in _MONITORS.items():
        if is_true(at(config, f"{section}.enabled")) and find_spec(package) is None:
            raise UserError(f"{section}.enabled is true, and {package} is not installed: pip install {package}")


def _check_numbers(config: Mapping[str, Any]) -> None:
    for key in NUMBERS:
        value = config.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        unset = key not in config or (value is None and key == "steps_per_print")
        if not (is_number or unset or (value == AUTO and key == "gradient_clipping")):
            raise UserError(f"{key} is {value!r}: write a number that is not negative")
    for key in BATCH_KEYS:
        value = config.get(key)
        is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1 and value % 1 == 0
        if not (is_whole or value is None or value == AUTO):
            raise UserError(f"{key} is {value!r}: write a whole number from 1")


def _check_dtypes(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime.config import DtypeEnum

    for path in DTYPES:
        value = at(config, path)
        if value is None:
            continue
        try:
            DtypeEnum(value)
        except (KeyError, ValueError, TypeError):
            raise UserError(f'{path} is {value!r}: write "fp32", "bf16" or "fp16", or leave it out') from None


def _typed(key: str, section: Any) -> Any:
    """A section with its plain values as DeepSpeed reads them; "auto" and objects in it as they are."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not isinstance(section, Mapping):
        return section
    model = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config}.get(key, DeepSpeedBF16Config)
    names = {field.alias or name: name for name, field in model.model_fields.items()}
    try:
        read = model(**section)
    except Exception as error:
        raise _refusal(error, key) from error
    typed = dict(section)
    for name, value in section.items():
        meant = getattr(read, names.get(str(name), str(name)), None)
        if isinstance(value, (bool, int, float, str)) and value != AUTO and isinstance(meant, (bool, int, float, str)):
            typed[name] = meant
    return typed


def _check_whole(config: Mapping[str, Any]) -> None:
    """Let DeepSpeed read all of it, as an engine will."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # The type of an optimizer may be one of ours. Of batch sizes any will do here.
    left_out = (*BATCH_KEYS, "optimizer", "gradient_clipping", "sequence_parallel_size")
    given = {key: value for key, value in config.items() if key not in left_out}
    if at(config, "zero_optimization.stage") == AUTO:  # some stage of ZeRO, it may become
        given["zero_optimization"] = {**given["zero_optimization"], "stage": 1}
    try:
        DeepSpeedConfig({**given, BATCH_KEYS[1]: 1})
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception, section: str | None = None) -> UserError:
    """Whatever ends the reading of a config is about the config."""
    line = complaint(error, section)
    text = " ".join(str(error).split())
    return UserError(line or f"DeepSpeed does not take this config: {type(error).__name__}: {text}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without DeepSpeed's warnings: the engine's own reading gives them once more."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
