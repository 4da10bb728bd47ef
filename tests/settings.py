"""What users set of DeepSpeed, and where: a row a setting, for the docs' table and for the test of twenty losses.

A new setting is a row here. Where its model is not that of ``tests/distributed/training.py``, or an engine of it is
started or stepped otherwise, the row names the function that trains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL = (0, 1, 2, 3)
SHARDED = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting at the stages where it means something.

    name: as the docs show it, in Markdown. stages: of ZeRO. config: what goes into the JSON (``zero_optimization``
    without the stage). ranks: numbers of ranks that it is trained on beside AdamW, by stage or the same at all of
    them; none where no CPU can train it. losses: where "module:name" is the function that trains it, called as
    ``of_small_net`` of tests/distributed/losses.py. types: ours that are trained.
    refused: why, by stage, where no check of the config says so itself (the model or the wrapper is refused).
    flags: of ``ds-optim train`` beside its ``--config``; None where it has no such model.
    """

    name: str
    stages: tuple[int, ...] = ALL
    config: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] | Mapping[int, tuple[int, ...]] = (2,)
    losses: str = "tests.distributed.losses:of_small_net"
    types: tuple[str, ...] = ("LionMuon",)
    refused: Mapping[int, str] = field(default_factory=dict)
    flags: Mapping[str, Any] | None = field(default_factory=dict)

    def config_at(self, stage: int) -> dict[str, Any]:
        """The settings as they stand in a JSON of that stage."""
        return {**self.config, "zero_optimization": {**self.config.get("zero_optimization", {}), "stage": stage}}

    def ranks_at(self, stage: int) -> tuple[int, ...]:
        return self.ranks if isinstance(self.ranks, tuple) else self.ranks.get(stage, ())


def _zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


_BF16 = {"bf16": {"enabled": True}}
_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
_OFFLOAD = _zero(offload_optimizer={"device": "cpu"})
_FILES = {"device": "nvme", "nvme_path": "/nvme"}
_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
_AUTOEP = {"enabled": True, "autoep_size": 2, "preset_model": "deepseek_v3", "use_grouped_mm": False}
_PIPELINE = "DeepSpeed's pipeline engine trains at stages 0 and 1"


def _autocast(dtype: str) -> dict[str, Any]:
    return {"torch_autocast": {"enabled": True, "dtype": dtype}}


SETTINGS: tuple[Setting, ...] = (
    Setting(name="fp32", ranks={0: (2,), 1: (2, 3), 2: (2,), 3: (2, 3)}),
    Setting(name="bf16", config=_BF16, ranks={0: (2,), 1: (2,), 2: (2, 4), 3: (2, 3)}),
    Setting(
        name="bf16, gradients accumulated in fp32 (`data_types.grad_accum_dtype`)",
        stages=(1,),
        config={**_BF16, **_SUMS},
    ),
    Setting(name="fp16 with a loss scale", config={"fp16": {"enabled": True}}, ranks=()),
    Setting(name="fp16 with `loss_scale` 1", config={"fp16": {"enabled": True, "loss_scale": 1}}, ranks=()),
    Setting(name="bf16 master weights, with `bf16_optimizer_states`", config=_MASTERS),
    Setting(name="bf16 master weights with optimizer offload", config={**_MASTERS, **_OFFLOAD}),
    Setting(name="`torch_autocast` in bf16, over fp32 weights", config=_autocast("bfloat16")),
    Setting(name="`torch_autocast` in fp16, which scales losses", config=_autocast("float16")),
    Setting(name="`gradient_clipping`", config={"gradient_clipping": 1.0}),
    Setting(name="`gradient_accumulation_steps` above 1", config={"gradient_accumulation_steps": 3}, ranks=(3,)),
    Setting(name="`offload_optimizer` to the CPU", stages=SHARDED, config=_OFFLOAD),
    Setting(name="`reduce_scatter`, on and off", stages=SHARDED, config=_zero(reduce_scatter=False)),
    Setting(name="`overlap_comm`, on and off", stages=SHARDED, config=_zero(overlap_comm=True)),
    Setting(name="`contiguous_gradients`, on and off", stages=SHARDED, config=_zero(contiguous_gradients=False)),
    Setting(name="`round_robin_gradients`", stages=(1, 2), config=_zero(round_robin_gradients=True), ranks=(2, 3, 4)),
    Setting(name="`sub_group_size`", stages=(3,), config=_zero(sub_group_size=1000), ranks=(3,)),
    Setting(
        name="`stage3_param_persistence_threshold`", stages=(3,), config=_zero(stage3_param_persistence_threshold=0)
    ),
    Setting(
        name="AutoTP (`tensor_parallel.autotp_size`)",
        config={"tensor_parallel": {"autotp_size": 2}},
        ranks={0: (2,), 1: (2, 4), 2: (4,), 3: (2, 4)},
        losses="tests.distributed.tensor_models:losses_of_autotp",
    ),
    Setting(
        name="tensor parallelism by hand, with an `mpu`",
        ranks={0: (2,), 1: (4,), 2: (2,), 3: (4,)},
        losses="tests.distributed.tensor_models:losses_by_hand",
        flags=None,
    ),
    Setting(
        name="`deepspeed.zero.Init`",
        stages=(3,),
        losses="tests.distributed.losses:under_zero_init",
        flags={"zero_init": True},
    ),
    Setting(
        name="pipeline engine (`PipelineModule`), fp32",
        ranks=(2, 4),
        losses="tests.distributed.pipelines:losses",
        flags=None,
        refused=dict.fromkeys((2, 3), _PIPELINE),
    ),
    Setting(
        name="pipeline engine, bf16",
        config=_BF16,
        ranks=(4,),
        losses="tests.distributed.pipelines:losses",
        flags=None,
        refused={
            0: "DeepSpeed saves the optimizer's state of the first rank of a stage alone",
            **dict.fromkeys((2, 3), _PIPELINE),
        },
    ),
    Setting(
        name="`sequence_parallel_size` above 1, with ALST's `mpu`",
        config={"sequence_parallel_size": 2},
        ranks={0: (2,), 1: (2, 4), 2: (2,), 3: (2, 4)},
        losses="tests.distributed.sequences:losses",
    ),
    Setting(
        name="the same in bf16",
        config={"sequence_parallel_size": 2, **_BF16},
        losses="tests.distributed.sequences:losses",
    ),
    Setting(
        name="the same in bf16, gradients accumulated in fp32",
        stages=(1,),
        config={"sequence_parallel_size": 2, **_BF16, **_SUMS},
    ),
    Setting(
        name="the same without `reduce_scatter`",
        stages=SHARDED,
        config={"sequence_parallel_size": 2, **_zero(reduce_scatter=False)},
        ranks={1: (2,), 2: (2,)},
        losses="tests.distributed.sequences:losses",
    ),
    Setting(
        name="DeepSpeed's `MoE` layers, experts over fewer ranks",
        ranks=(2, 4),
        losses="tests.distributed.experts:losses_of",
        flags=None,
        refused={3: "DeepSpeed 0.19 does not train its MoE layers there; set zero_optimization.stage to 2"},
    ),
    Setting(
        name="ZeRO++: `zero_hpz_partition_size`",
        stages=(3,),
        config=_zero(zero_hpz_partition_size=2, stage3_param_persistence_threshold=0),
        ranks=(2, 4),
        losses="tests.distributed.zeropp:losses",
    ),
    Setting(
        name="ZeRO++: `zero_quantized_weights`, its kernels stood in for",
        stages=(3,),
        config=_zero(zero_quantized_weights=True),
        losses="tests.distributed.zeropp:losses",
    ),
    Setting(
        name="ZeRO++: `zero_quantized_gradients`, its kernels stood in for",
        stages=(3,),
        config=_zero(zero_quantized_gradients=True),
        losses="tests.distributed.zeropp:losses",
    ),
    Setting(
        name="ZeRO++: `zero_quantized_nontrainable_weights`",
        stages=(3,),
        config=_zero(zero_quantized_nontrainable_weights=True),
    ),
    Setting(
        name="AutoEP (`expert_parallel.enabled`), of DeepSeek's models",
        config={"expert_parallel": _AUTOEP},
        ranks={0: (2,), 1: (2,), 2: (2, 4), 3: (2, 4)},
        losses="tests.distributed.test_autoep:losses_of",
        flags={"model": "deepseek"},
    ),
    Setting(
        name="`offload_optimizer` to NVMe",
        stages=SHARDED,
        config=_zero(offload_optimizer=_FILES),
        losses="tests.distributed.nvme:losses",
    ),
    Setting(
        name="`offload_param` to NVMe beside it, in bf16",
        stages=(3,),
        config={**_BF16, **_zero(offload_optimizer=_FILES, offload_param=_FILES, stage3_prefetch_bucket_size=0)},
        losses="tests.distributed.nvme:losses",
    ),
    Setting(name="DeepCompile (`compile.deepcompile`)", stages=SHARDED, config={"compile": {"deepcompile": True}}),
    Setting(
        name="ZenFlow", stages=SHARDED, config=_zero(zenflow={"topk_ratio": 0.1}, offload_optimizer={"device": "cpu"})
    ),
    Setting(name="SuperOffload", stages=(3,), config=_zero(offload_optimizer={"device": "cpu", "super_offload": True})),
)
