"""What is supported, and what to write instead of what is not.

Two looks at the same list: at a DeepSpeed config before the engine exists, and at the wrapper that steps a
client optimizer, whose config this package never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError

_ZERO = "zero_optimization"


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _above(limit: float) -> Any:
    return lambda value: isinstance(value, (int, float)) and value > limit


def _is_true(value: Any) -> bool:
    return value is True


def _is_false(value: Any) -> bool:
    return value is False


def _is_nvme(value: Any) -> bool:
    return str(getattr(value, "value", value)).lower() == "nvme"


def _is_given(value: Any) -> bool:
    return value is not None


def _below_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value < 1


# (path in the config, when it is refused, why and what to write instead)
_REFUSED_SETTINGS: list[tuple[str, Any, str]] = [
    (f"{_ZERO}.round_robin_gradients", _is_true, "it hides where a parameter lies; set it to false"),
    (f"{_ZERO}.compute_grad_norm", _is_false, "it switches off the check for NaN gradients; leave it true"),
    ("bf16.check_grad_overflow", _is_false, "it switches off the check for NaN gradients; leave it true"),
    ("bfloat16.check_grad_overflow", _is_false, "it switches off the check for NaN gradients; leave it true"),
    (f"{_ZERO}.offload_optimizer.device", _is_nvme, 'use "cpu"'),
    (f"{_ZERO}.offload_param.device", _is_nvme, 'use "cpu"'),
    (f"{_ZERO}.offload_optimizer.ratio", _below_one, "partial offload steps with a second optimizer; use ratio 1.0"),
    (f"{_ZERO}.offload_optimizer.super_offload", _is_true, "it steps with its own Adam; set it to false"),
    (f"{_ZERO}.zenflow", _is_given, "it steps with its own Adam; leave it out"),
    (f"{_ZERO}.zero_hpz_partition_size", _above(1), "ZeRO++ groups are not supported; set it to 1"),
    (f"{_ZERO}.zero_quantized_weights", _is_true, "ZeRO++ is not supported; set it to false"),
    (f"{_ZERO}.zero_quantized_nontrainable_weights", _is_true, "ZeRO++ is not supported; set it to false"),
    (f"{_ZERO}.zero_quantized_gradients", _is_true, "ZeRO++ is not supported; set it to false"),
    (f"{_ZERO}.mics_shard_size", _above(0), "MiCS groups are not supported; leave it out"),
    ("fp16.fp16_master_weights_and_grads", _is_true, "master weights must be fp32; set it to false"),
    ("bf16.bf16_master_weights_and_grads", _is_true, "master weights must be fp32; set it to false"),
    ("bfloat16.bf16_master_weights_and_grads", _is_true, "master weights must be fp32; set it to false"),
    ("torch_autocast.enabled", _is_true, 'use "bf16": {"enabled": true}'),
    ("amp.enabled", _is_true, 'use "bf16": {"enabled": true}'),
    ("compile.deepcompile", _is_true, "its graph passes own the optimizer step; set it to false"),
    ("sparse_gradients", _is_true, "set it to false"),
    ("tensor_parallel.autotp_size", _above(1), "a tensor-parallel shard is no whole matrix; set it to 1"),
    ("sequence_parallel_size", _above(1), "it is not supported; set it to 1"),
    ("data_efficiency.data_routing.random_ltd.enabled", _is_true, "it is not supported; set it to false"),
    ("pipeline.stages", _above(1), "the pipeline engine is not supported"),
]

# The same, as attributes of DeepSpeed's wrappers.
_REFUSED_ATTRIBUTES: list[tuple[str, Any, str]] = [
    ("round_robin_gradients", _is_true, "set zero_optimization.round_robin_gradients to false"),
    ("compute_grad_norm", _is_false, "leave zero_optimization.compute_grad_norm true"),
    ("zenflow", _is_true, "leave zero_optimization.zenflow out"),
    ("swap_optimizer", _is_true, 'set zero_optimization.offload_optimizer.device to "cpu"'),
    ("params_in_nvme_and_cpu", _is_true, 'set zero_optimization.offload_param.device to "cpu"'),
    ("partial_offload", _below_one, "set zero_optimization.offload_optimizer.ratio to 1.0"),
    ("zero_hpz_partition_size", _above(1), "set zero_optimization.zero_hpz_partition_size to 1"),
    ("zero_quantized_gradients", _is_true, "set zero_optimization.zero_quantized_gradients to false"),
    ("has_moe_layers", _is_true, "DeepSpeed's MoE groups are not supported"),
    ("torch_autocast_gradscaler", _is_given, 'use "bf16": {"enabled": true} instead of torch_autocast'),
    ("low_precision_master_weights_and_grads", _is_true, "master weights must be fp32"),
]


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse the settings of a DeepSpeed config that the optimizers here cannot be right under.

    Raises:
        UserError: naming the setting and what to write instead.
    """
    for path, refused, remedy in _REFUSED_SETTINGS:
        if refused(_at(config, path)):
            raise UserError(f"{path} = {_at(config, path)!r} is not supported with ds_optim's optimizers: {remedy}")
    stage = _at(config, f"{_ZERO}.stage")
    if stage not in (None, 0, 1, 2, 3):
        raise UserError(f"{_ZERO}.stage is {stage!r}: write 0, 1, 2 or 3")


def check_wrapper(wrapper: Any) -> None:
    """Refuse the same settings, seen from the wrapper that steps a client optimizer."""
    for name, refused, remedy in _REFUSED_ATTRIBUTES:
        if refused(getattr(wrapper, name, None)):
            raise UserError(
                f"DeepSpeed's {name} = {getattr(wrapper, name)!r} is not supported with ds_optim's optimizers: {remedy}"
            )
    if getattr(wrapper, "check_grad_overflow", True) is False and getattr(wrapper, "dtype", None) == torch.bfloat16:
        raise UserError("bf16.check_grad_overflow = false is not supported with ds_optim's optimizers: leave it true")


def check_parameters(named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    """Refuse parameters that DeepSpeed or another layer will treat apart.

    Raises:
        UserError: naming the parameter.
    """
    for name, parameter in named:
        if getattr(parameter, "use_muon", False):
            raise UserError(
                f"{name}.use_muon is set: DeepSpeed would orthogonalize its gradient first. Remove the attribute, and "
                'hand deepspeed.initialize no "optimizer" of type Muon beside a ds_optim optimizer'
            )
        if getattr(parameter, "allreduce", True) is False:
            raise UserError(f"{name} is a DeepSpeed MoE expert: MoE groups are not supported")
        if getattr(parameter, "tensor_model_parallel", False):
            raise UserError(f"{name} is a tensor-parallel shard and no whole matrix: use tensor parallel size 1")


def check_model(model: torch.nn.Module) -> None:
    """Refuse models that bring their own parallelism along."""
    if any(cls.__name__ == "PipelineModule" for cls in type(model).__mro__):
        raise UserError("the pipeline engine is not supported: pass the model as a plain module")
