"""DeepSpeed JSONs as LLaMA-Factory, axolotl and ms-swift ship them: what they set, written anew (read 2026-11-28).

LLaMA-Factory `examples/deepspeed`, axolotl `deepspeed_configs`, ms-swift `swift/llm/ds_config`, in versions with and
without an "optimizer" of their own.
"""

from __future__ import annotations

from typing import Any

AUTO = "auto"
_BATCH = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), AUTO)
_CLIP = {"gradient_clipping": AUTO}
_ADAMW = {"optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)}}
_COSINE = {
    "scheduler": {"type": "WarmupCosineLR", "params": dict.fromkeys(("total_num_steps", "warmup_num_steps"), AUTO)}
}
_PINNED = {"device": "cpu", "pin_memory": True}
_NOWHERE = {"device": "none", "pin_memory": True}
_WIDTHS = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), AUTO
)


def _precision(power: int, **more: Any) -> dict[str, Any]:
    scale = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": power, "hysteresis": 2}
    return {
        "fp16": {"enabled": AUTO, **more, **scale, "min_loss_scale": 1},
        "bf16": {"enabled": AUTO},
    }


def _stage3(*, overlap: bool, live: float, groups: float, short_names: bool = False) -> dict[str, Any]:
    names = ("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save")
    values = (live, live, True)
    named = {(name if short_names else f"stage3_{name}"): value for name, value in zip(names, values, strict=True)}
    return {
        "stage": 3,
        "overlap_comm": overlap,
        "contiguous_gradients": True,
        "sub_group_size": groups,
        **_WIDTHS,
        **named,
    }


def _llama_factory(zero: dict[str, Any]) -> dict[str, Any]:
    monitors = {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}}
    return {
        **_BATCH,
        **_CLIP,
        "zero_allow_untested_optimizer": True,
        **_precision(16),
        "zero_optimization": zero,
        "comms_config": {"verbose": False},
        "monitor_config": monitors,
    }


def _buckets(size: float, **more: Any) -> dict[str, Any]:
    return {
        "allgather_partitions": True,
        "allgather_bucket_size": size,
        "reduce_scatter": True,
        "reduce_bucket_size": size,
        "contiguous_gradients": True,
        **more,
    }


def _axolotl(zero: dict[str, Any], **sections: Any) -> dict[str, Any]:
    precision = _precision(32, auto_cast=False)
    return {"zero_optimization": zero, **precision, **sections, **_BATCH, "wall_clock_breakdown": False}


def _axolotl_bf16(zero: dict[str, Any], **sections: Any) -> dict[str, Any]:
    logs = {"wall_clock_breakdown": False}
    return {**sections, "zero_optimization": zero, "bf16": {"enabled": True}, **_BATCH, **_CLIP, **logs}


def _swift(zero: dict[str, Any], **sections: Any) -> dict[str, Any]:
    logs = {"steps_per_print": 2000, "wall_clock_breakdown": False}
    return {**_precision(16), **sections, "zero_optimization": zero, **_BATCH, **_CLIP, **logs}


_LF = _buckets(5e8, overlap_comm=False, round_robin_gradients=True)
_LF3 = _stage3(overlap=False, live=1e9, groups=1e9)
_AX3 = _stage3(overlap=True, live=0, groups=0)
_AX3_SHORT = _stage3(overlap=True, live=0, groups=0, short_names=True)
_SW = _buckets(2e8, overlap_comm=True)
_SW3 = _stage3(overlap=True, live=1e9, groups=1e9)
_CLIENTS = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
_SW_ADAMW = {**_ADAMW, **_COSINE}

SHIPPED: dict[str, dict[str, Any]] = {
    "llama-factory z0": _llama_factory({"stage": 0, **_LF}),
    "llama-factory z2": _llama_factory({"stage": 2, **_LF}),
    "llama-factory z2 offload": _llama_factory({"stage": 2, "offload_optimizer": _PINNED, **_LF}),
    "llama-factory z3": _llama_factory(_LF3),
    "llama-factory z3 offload": _llama_factory({**_LF3, "offload_optimizer": _PINNED, "offload_param": _PINNED}),
    "axolotl zero1": _axolotl({"stage": 1, "overlap_comm": True}, **_ADAMW),
    "axolotl zero2": _axolotl(
        {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True, "overlap_comm": True},
        **_CLIP,
    ),
    "axolotl zero3": _axolotl(_AX3, **_CLIP),
    "axolotl zero3_cpuoffload": _axolotl({**_AX3, "offload_optimizer": _PINNED, "offload_param": _PINNED}, **_CLIP),
    "axolotl zero3_bf16": _axolotl_bf16(
        {
            **{key: value for key, value in _AX3_SHORT.items() if key not in _WIDTHS},
            **{key.removeprefix("stage3_"): AUTO for key in _WIDTHS},
        }
    ),
    "axolotl zero3_bf16_cpuoffload_params": _axolotl_bf16({**_AX3_SHORT, "offload_param": _PINNED}, **_CLIENTS),
    "axolotl zero3_bf16_cpuoffload_all": _axolotl_bf16(
        {**_AX3_SHORT, "offload_optimizer": _PINNED, "offload_param": _PINNED}, **_CLIENTS
    ),
    "ms-swift zero0": _swift({"stage": 0, **_SW, "overlap_comm": False}, tensor_parallel={"autotp_size": 1}),
    "ms-swift zero1": _swift({"stage": 1, "offload_optimizer": _NOWHERE, **_SW}),
    "ms-swift zero2": _swift({"stage": 2, "offload_optimizer": _NOWHERE, **_SW}, **_SW_ADAMW),
    "ms-swift zero2_offload": _swift({"stage": 2, "offload_optimizer": _PINNED, **_SW}, **_SW_ADAMW),
    "ms-swift zero3": _swift({**_SW3, "offload_optimizer": _NOWHERE, "offload_param": _NOWHERE}),
    "ms-swift zero3_offload": _swift({**_SW3, "offload_optimizer": _PINNED, "offload_param": _PINNED}, **_SW_ADAMW),
}
"""By project and file."""
