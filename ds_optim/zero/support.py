"""What is supported, and what to write instead of what is not.

Three looks: at a DeepSpeed config and a model before the engine exists, and, for a client optimizer whose
config this package never saw, at the engine and the wrapper that step it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.zero.auto import at, check_filled
from ds_optim.zero.files import check_files
from ds_optim.zero.pipeline import check_pipeline
from ds_optim.zero.refused import (
    AUTOCAST_FP16,
    BF16,
    FP16,
    HPZ,
    MASTERS,
    OFFLOAD,
    OTHER_MASTERS,
    REFUSED_ATTRIBUTES,
    REFUSED_BESIDE,
    REFUSED_SETTINGS,
    REFUSED_WRAPPERS,
    SEQUENCE,
    STATES,
    SUMS_OF_SHARDS,
    TENSOR,
    TOGETHER,
    WEIGHTS_ALONE,
    ZERO,
    above,
    as_number,
    is_false,
    is_given,
    is_true,
)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse the settings of a DeepSpeed config that the optimizers here cannot be right under.

    Raises:
        UserError: naming the setting and what to write instead.
    """
    if isinstance(config.get(ZERO), bool):
        raise UserError(f'{ZERO} is {config[ZERO]!r}: write {{"stage": 1}}')
    for path, refused, remedy in REFUSED_SETTINGS:
        value = at(config, path)
        if refused(value) and not is_beside(config, path):
            raise UserError(f"{path} = {value!r} is not supported with ds_optim's optimizers: {remedy}")
    stage = at(config, f"{ZERO}.stage")
    if isinstance(stage, str) and stage.isdecimal():
        stage = int(stage)  # as DeepSpeed reads it
    if stage in (None, 0):
        _check_unsharded(config)
    _check_bf16_masters(config, stage)
    _check_autocast(config)
    check_files(config)
    for path, refused, other, too, remedy in REFUSED_BESIDE:
        if refused(at(config, path)) and too(at(config, other)):
            raise UserError(f"{path} is not supported beside {other} with ds_optim's optimizers: {remedy}")
    if tensor_parallel_size(config) > 1 and is_true(at(config, "checkpoint.load_universal")):
        raise UserError(
            "checkpoint.load_universal is not supported under tensor parallelism with ds_optim's optimizers: set it to "
            "false, and load a checkpoint that was saved at the same tensor parallel size"
        )
    check_sums(config, sequences_cut_in(config) or 1)
    if stage in (None, "auto", 0) and is_true(at(config, "fp16.enabled")) and at(config, "fp16.loss_scale") != 1:
        raise UserError(
            "fp16 at ZeRO stage 0 is not supported with a loss scale: DeepSpeed 0.19 unscales gradients there whose "
            "loss it never scaled; use stage 1, bf16, or fp16.loss_scale 1"
        )


def is_beside(config: Mapping[str, Any], path: str) -> bool:
    """Whether the setting stands beside the one that it is supported with."""
    other, fits = TOGETHER.get(path, ("", None))
    return fits is not None and fits(at(config, other))


def uses_bf16_masters(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed config asks for bf16 master weights, supported or not."""
    return _masters_section(config) is not None


def tensor_parallel_size(config: Mapping[str, Any]) -> int:
    """Over how many ranks AutoTP is to cut the model; 1 without it."""
    size = at(config, TENSOR)
    return max(1, int(size)) if above(1)(size) else 1


def _masters_section(config: Mapping[str, Any]) -> str | None:
    return next((section for section in BF16 if is_true(at(config, f"{section}.{MASTERS}"))), None)


def _check_bf16_masters(config: Mapping[str, Any], stage: Any) -> None:
    """Refuse bf16 master weights where DeepSpeed has none to give, or gives them to its own optimizers alone."""
    section = _masters_section(config)
    if section is None:
        return
    offload = at(config, f"{OFFLOAD}.device") not in (None, "none") or is_true(at(config, f"{ZERO}.cpu_offload"))
    problems = (
        (at(config, f"{section}.enabled") in (None, False, 0), f'set "enabled" to true in "{section}" as well'),
        (stage in (None, 0), f"master weights are ZeRO's; set {ZERO}.stage to 1, 2 or 3"),
        (offload, f"DeepSpeed offloads them for its own CPU Adam alone; leave {ZERO}.offload_optimizer out"),
        (
            stage == 1 and _sums_in_fp32(config),
            "at stage 1 DeepSpeed keeps fp32 masters where gradients are accumulated in fp32; leave "
            "data_types.grad_accum_dtype out, or use stage 2",
        ),
    )
    for refused, remedy in problems:
        if refused:
            raise UserError(f"{section}.{MASTERS} = true is not supported with these settings: {remedy}")


def _check_unsharded(config: Mapping[str, Any]) -> None:
    """Refuse at stage 0 what DeepSpeed has for shards alone, and says so in words that are of something else."""
    if at(config, f"{OFFLOAD}.device") == "cpu":
        raise UserError(f"{OFFLOAD} is for ZeRO stages 1 to 3: set {ZERO}.stage to one of them, or leave it out")
    switched = {"bf16": BF16, "fp16": ("fp16",)}
    on = [name for name, keys in switched.items() if any(is_true(at(config, f"{key}.enabled")) for key in keys)]
    weights = on[0] if on else "fp32"
    if weights != "fp32" and _sums_in_fp32(config):
        raise UserError(
            f"data_types.grad_accum_dtype = fp32 is for ZeRO stages 1 to 3 where weights are {weights}: set "
            f"{ZERO}.stage to one of them, or leave it out"
        )


def _sums_in_fp32(config: Mapping[str, Any]) -> bool:
    return str(at(config, "data_types.grad_accum_dtype")).removeprefix("torch.") in ("fp32", "float32", "float")


def sequences_cut_in(config: Mapping[str, Any]) -> int | None:
    """Among how many ranks a DeepSpeed config says that each sequence is cut; None where it says nothing.

    Raises:
        UserError: it is no whole number from 1.
    """
    value = config.get(SEQUENCE)
    if not is_given(value):
        return None
    if isinstance(value, bool) or (number := as_number(value)) is None or number < 1 or number != int(number):
        raise UserError(f"{SEQUENCE} is {value!r}: write a whole number of ranks, 1 for none")
    return int(number)


def check_sums(config: Mapping[str, Any], sequence: int) -> None:
    """Refuse where DeepSpeed sums no gradients, or not all of them alike, where ``sequence`` ranks share a sequence.

    Raises:
        UserError: with what to write instead.
    """
    if sequence == 1:
        return
    stage, in_bf16 = str(at(config, f"{ZERO}.stage")), any(is_true(at(config, f"{key}.enabled")) for key in BF16)
    on_device = at(config, f"{OFFLOAD}.device") in (None, "none")
    if stage == "1" and in_bf16 and on_device and _sums_in_fp32(config):
        raise UserError(
            f"data_types.grad_accum_dtype = fp32 is not supported at stage 1 with {SEQUENCE} above 1: DeepSpeed 0.19 "
            "measures gradients on the first rank of a sequence alone, and fails on the others; use stage 2, or leave "
            "it out"
        )
    if stage == "3" and is_false(at(config, f"{ZERO}.reduce_scatter")):
        raise UserError(
            f"{ZERO}.reduce_scatter = false is not supported at stage 3 with {SEQUENCE} above 1: DeepSpeed 0.19 "
            "divides gradients of parameters larger than reduce_bucket_size by more than the others; leave it true"
        )


def uses_autocast(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed config asks for torch's autocast over fp32 weights, supported or not."""
    return is_true(at(config, "torch_autocast.enabled"))


def is_autocast_unsafe(config: Mapping[str, Any]) -> bool:
    """Whether autocast is, or may be, in fp16 where DeepSpeed's gradient scaler cannot be right."""
    dtype, stage = at(config, "torch_autocast.dtype"), at(config, f"{ZERO}.stage")
    in_fp16 = str(dtype).removeprefix("torch.") in FP16
    return dtype is None or (in_fp16 and stage not in (None, "auto", 0, "0"))


def _check_autocast(config: Mapping[str, Any]) -> None:
    """Refuse autocast in fp16 where DeepSpeed's gradient scaler cannot be right, and where nobody says a dtype."""
    if not uses_autocast(config):
        return
    dtype = at(config, "torch_autocast.dtype")
    if dtype is None:
        raise UserError(
            "torch_autocast.enabled = True without a dtype is not supported with ds_optim's optimizers: torch takes "
            'fp16 on GPUs then, and DeepSpeed scales no loss for it; set torch_autocast.dtype to "bfloat16"'
        )
    if is_autocast_unsafe(config):
        raise UserError(
            f"torch_autocast.dtype = {dtype!r} is not supported at ZeRO stages 1 to 3 with ds_optim's optimizers: "
            f"{AUTOCAST_FP16}"
        )


def check_engine(engine: Any) -> None:
    """Refuse the same in the engine that steps a client optimizer."""
    config = engine.config
    if not isinstance(config, Mapping):
        return
    check_config(config)
    check_filled(config)
    check_pipeline(getattr(engine, "module", None), config)
    section = config.get("optimizer")
    if isinstance(section, Mapping) and section.get("type") is not None:
        raise UserError(
            f"an optimizer is given in code and in the config ({section['type']!r}): remove one of them, or hand "
            "deepspeed.initialize the config that ds_optim.from_config returns"
        )


def check_wrapper(wrapper: Any) -> None:
    """Refuse the same in the wrapper that steps a client optimizer."""
    for cls in type(wrapper).__mro__:
        if cls.__name__ in REFUSED_WRAPPERS:
            raise UserError(
                f"{cls.__name__} is not supported with ds_optim's optimizers: {REFUSED_WRAPPERS[cls.__name__]}"
            )
    masters = getattr(wrapper, "master_weights_and_grads_dtype", torch.float32)
    bf16_masters = masters == torch.bfloat16 and is_true(getattr(wrapper, STATES, None)) and not _offloads(wrapper)
    if masters != torch.float32 and not bf16_masters:
        raise UserError(f"master weights in {masters} are not supported with ds_optim's optimizers: {OTHER_MASTERS}")
    for name, refused, remedy in REFUSED_ATTRIBUTES:
        value = getattr(wrapper, name, None)
        if refused(value) and not (bf16_masters and name == "low_precision_master_weights_and_grads"):
            shown = f" = {value!r}" if isinstance(value, (bool, int, float)) else ""
            raise UserError(f"DeepSpeed's {name}{shown} is not supported with ds_optim's optimizers: {remedy}")
    if getattr(wrapper, "params_in_nvme_and_cpu", False) and not getattr(wrapper, "swap_optimizer", False):
        raise UserError(
            f"DeepSpeed's params_in_nvme_and_cpu is not supported with ds_optim's optimizers: {WEIGHTS_ALONE}"
        )
    if getattr(wrapper, "model_parallel_group", None):
        if above(1)(getattr(wrapper, "zero_hpz_partition_size", 1)):
            raise UserError(f"{ZERO}.zero_hpz_partition_size is not supported under tensor parallelism: {HPZ}")
        if getattr(wrapper, "all2all_process_group", None) is not None:
            raise UserError(
                f"{ZERO}.zero_quantized_gradients is not supported under tensor parallelism: {SUMS_OF_SHARDS}"
            )
    if getattr(wrapper, "check_grad_overflow", True) is False and getattr(wrapper, "dtype", None) == torch.bfloat16:
        raise UserError("bf16.check_grad_overflow = False is not supported with ds_optim's optimizers: leave it true")


def _offloads(wrapper: Any) -> bool:
    return any(getattr(wrapper, name, False) is True for name in ("cpu_offload", "offload_optimizer"))


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


def check_model(model: torch.nn.Module) -> None:
    """Refuse models that bring their own parallelism along."""
    check_pipeline(model, {})
