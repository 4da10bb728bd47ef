"""Settings that are refused, as they stand in a DeepSpeed config and on DeepSpeed's wrappers: when, and what to write
instead. The docs' tables are made from these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

ZERO = "zero_optimization"
OFFLOAD = f"{ZERO}.offload_optimizer"
WEIGHTS = f"{ZERO}.offload_param"
MASTERS, STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"
_MASTERS_ALONE = (
    f"without {STATES} DeepSpeed takes its own CPU Adam alone; set {STATES} to true too, or set it to false"
)
BF16 = ("bf16", "bfloat16")
FP16 = ("fp16", "float16", "half")
AUTOCAST_FP16 = (
    "DeepSpeed 0.19 never lowers its loss scale after an overflow, and clips gradients before they are unscaled; set "
    'torch_autocast.dtype to "bfloat16", or zero_optimization.stage to 0'
)
_ROUNDED = "DeepSpeed 0.19 rounds frozen weights to whole numbers in its int8 shards"
HPZ = "DeepSpeed 0.19 takes neighbours, which hold other shards, for the ranks that share its second copy; set it to 1"
SEQUENCE = "sequence_parallel_size"
_STATES_ALONE = f"it goes with {MASTERS}; set both to true, or set it to false"

_IN_FILES = (
    "DeepSpeed 0.19 offloads to files at stage 3 alone, and at others keeps state in the host's memory without a word; "
    'set zero_optimization.stage to 3, or use "cpu"'
)

WEIGHTS_ALONE = (
    "DeepSpeed 0.19 loads no checkpoint of weights in files whose optimizer state is in memory; set "
    'zero_optimization.offload_optimizer.device to "nvme" too, or use "cpu"'
)

Test = Callable[[Any], bool]


def is_true(value: Any) -> bool:
    """True as DeepSpeed's pydantic models read it: they take strings and numbers too."""
    return value is True or value == 1 or str(value).lower() in ("true", "1", "yes", "y", "on", "t")


def is_false(value: Any) -> bool:
    return value is not None and (
        value is False or value == 0 or str(value).lower() in ("false", "0", "no", "n", "off", "f")
    )


def is_nvme(value: Any) -> bool:
    return str(getattr(value, "value", value)).lower() == "nvme"


def is_given(value: Any) -> bool:
    # "auto" is how transformers writes "not set"; DeepSpeed drops it
    return value is not None and value != "auto"


def as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def above(limit: float) -> Test:
    return lambda value: (number := as_number(value)) is not None and number > limit


def _below_one(value: Any) -> bool:
    return (number := as_number(value)) is not None and number < 1


# (path in the config, when it is refused, why and what to write instead)
REFUSED_SETTINGS: Sequence[tuple[str, Test, str]] = (
    (f"{ZERO}.compute_grad_norm", is_false, "it switches off the check for NaN gradients; leave it true"),
    ("bf16.check_grad_overflow", is_false, "it switches off the check for NaN gradients; leave it true"),
    ("bfloat16.check_grad_overflow", is_false, "it switches off the check for NaN gradients; leave it true"),
    (f"{OFFLOAD}.device", is_nvme, _IN_FILES),
    (f"{WEIGHTS}.device", is_nvme, WEIGHTS_ALONE),
    (f"{OFFLOAD}.ratio", _below_one, "partial offload steps with a second optimizer; use ratio 1.0"),
    (f"{OFFLOAD}.super_offload", is_true, "it steps with its own Adam; set it to false"),
    (f"{ZERO}.zenflow", is_given, "it steps with its own Adam; leave it out"),
    (f"{ZERO}.zero_quantized_nontrainable_weights", is_true, f"{_ROUNDED}; set it to false"),
    (f"{ZERO}.elastic_checkpoint", is_true, "it cuts optimizer state at other borders; set it to false"),
    ("fp16.fp16_master_weights_and_grads", is_true, "master weights must be fp32; set it to false"),
    (f"bf16.{MASTERS}", is_true, _MASTERS_ALONE),
    (f"bfloat16.{MASTERS}", is_true, _MASTERS_ALONE),
    (f"bf16.{STATES}", is_true, _STATES_ALONE),
    (f"bfloat16.{STATES}", is_true, _STATES_ALONE),
    ("fp8.enabled", is_true, 'use "bf16": {"enabled": true}'),
    (
        "compile.deepcompile",
        is_true,
        "its passes are CUDA code, not tried with these optimizers; set it to false, and call engine.compile()",
    ),
    ("tensor_parallel.tp.tp_size", above(1), "it cuts nothing without autotp_size; set it to 1, or both"),
    ("tensor_parallel.tensor_parallel.tp_size", above(1), "it cuts nothing without autotp_size; set it to 1, or both"),
    ("hybrid_engine.enabled", is_true, "the hybrid engine is not supported; set it to false"),
    ("data_efficiency.data_routing.random_ltd.enabled", is_true, "it is not supported; set it to false"),
    ("pipeline.stages", above(1), "DeepSpeed reads it nowhere; give num_stages to PipelineModule, and leave it out"),
)

# Settings of the list above that are supported beside each other, with what the other has to be.
TOGETHER: Mapping[str, tuple[str, Test]] = {
    **{
        f"{section}.{one}": (f"{section}.{other}", is_true)
        for section in BF16
        for one, other in ((MASTERS, STATES), (STATES, MASTERS))
    },
    **{
        f"tensor_parallel.{name}.tp_size": ("tensor_parallel.autotp_size", above(1))
        for name in ("tp", "tensor_parallel")
    },
    f"{OFFLOAD}.device": (f"{ZERO}.stage", lambda stage: as_number(stage) == 3),
    f"{WEIGHTS}.device": (f"{OFFLOAD}.device", is_nvme),
}
TENSOR = "tensor_parallel.autotp_size"
_EXPERTS = "expert_parallel.enabled"
SUMS_OF_SHARDS = (
    "DeepSpeed 0.19 sums quantized gradients over all ranks, those that hold other shards too; set it to false"
)
# Settings that are refused beside each other: (path, when, path of the other, when, why or what to write instead).
REFUSED_BESIDE: Sequence[tuple[str, Test, str, Test, str]] = (
    (f"{ZERO}.zero_hpz_partition_size", above(1), TENSOR, above(1), HPZ),
    (f"{ZERO}.zero_quantized_gradients", is_true, TENSOR, above(1), SUMS_OF_SHARDS),
    (SEQUENCE, above(1), TENSOR, above(1), "set one of them to 1"),
    (_EXPERTS, is_true, TENSOR, above(1), f"set {TENSOR} to 0"),
    (_EXPERTS, is_true, SEQUENCE, above(1), f"set {SEQUENCE} to 1"),
    (_EXPERTS, is_true, f"{OFFLOAD}.device", is_nvme, 'DeepSpeed 0.19 saves no state in files then; use "cpu"'),
)
OTHER_MASTERS = f"master weights must be fp32, or bf16 with bf16.{MASTERS} and bf16.{STATES} and without offload"

# The same, as attributes of DeepSpeed's wrappers: for who steps a wrapper without its engine.
REFUSED_ATTRIBUTES: Sequence[tuple[str, Test, str]] = (
    ("compute_grad_norm", is_false, f"leave {ZERO}.compute_grad_norm true"),
    ("zenflow", is_true, f"leave {ZERO}.zenflow out"),
    ("partial_offload", _below_one, f"set {OFFLOAD}.ratio to 1.0"),
    ("zero_quantized_nontrainable_weights", is_true, f"set {ZERO}.zero_quantized_nontrainable_weights to false"),
    ("torch_autocast_gradscaler", is_given, AUTOCAST_FP16),
    ("low_precision_master_weights_and_grads", is_true, OTHER_MASTERS),
    ("elastic_checkpoint", is_true, f"set {ZERO}.elastic_checkpoint to false"),
)
REFUSED_WRAPPERS = {
    "SuperOffloadOptimizer_Stage3": f"set {OFFLOAD}.super_offload to false",
    "ZenFlowZeroOptimizer": f"leave {ZERO}.zenflow out",
}
