"""ZeRO++ on the CPU: hpZ as it is, and what the CUDA kernels of qwZ and qgZ do, in plain torch in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ds_optim
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.sharding.layout import build_layout
from tests.settings import Setting

from .losses import PARAMS, STEPS
from .sequences import new_model, one_step, start
from .training import Recorder, Weights


class Rounding:
    """Groups of values as whole numbers of so many bits and one scale, one number a byte; on nodes of one device."""

    Symmetric = 0

    def quantize(self, values: Tensor, groups: int, bits: int, kind: int) -> tuple[Tensor, Tensor]:
        rows = values.detach().float().reshape(groups, -1)
        scale = (rows.abs().amax(dim=1) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
        return (rows / scale[:, None]).round().to(torch.int8).flatten(), scale

    def dequantize(self, values: Tensor, scale: Tensor, groups: int, bits: int, kind: int) -> Tensor:
        return (values.float().reshape(groups, -1) * scale.reshape(-1, 1)).reshape(values.shape)

    def swizzle_quant(
        self, values: Tensor, groups: int, bits: int, kind: int, pipeline: int, nodes: int, devices: int
    ) -> tuple[Tensor, Tensor]:
        assert devices == 1, "with more, the kernel puts parts of a tensor in another order"
        return self.quantize(values, groups, bits, kind)

    def quantized_reduction(
        self, values: Tensor, scale: Tensor, groups: int, out: int, bits: int, kind: int, devices: int
    ) -> tuple[Tensor, Tensor]:
        assert devices == 1
        return values, scale


def stand_in() -> None:
    """Where DeepSpeed keeps its kernels once they are loaded; a rank of a test ends with it."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    coalesced_collectives.quantizer_module = CUDAQuantizer.quantizer_cuda_module = Rounding()


def losses(rank: int, world_size: int, setting: Setting, stage: int, type: str, steps: int = STEPS) -> list[float]:
    """The loss of every step on one batch: a row of tests/settings.py."""
    return train(rank, world_size, setting.config["zero_optimization"], type, steps)[0]


def train(
    rank: int, world_size: int, zero: Mapping[str, Any], type: str, steps: int
) -> tuple[list[float], Weights, list[Weights]]:
    """The losses, and on rank 0 the weights in full, with the gradients that ours were stepped with."""
    forget_groups()
    stand_in()
    engine = start(3, 1, world_size, {"type": type, "params": PARAMS[type]}, zero_optimization=dict(zero))
    recorder = None
    if type != "AdamW":
        members = [[member.spec for member in group[MEMBERS]] for group in ds_optim.param_groups(new_model())]
        recorder = Recorder(engine.basic_optimizer, build_layout(members, stage=3, world_size=world_size), rank)
    found = [one_step(engine, 0, 1, rank, world_size) for _ in range(steps)]
    trained = None if recorder is None else recorder.collect()
    engine.destroy()
    return (found, {}, []) if trained is None else (found, trained.weights, trained.gradients)


def forget_groups() -> None:
    """DeepSpeed makes hpZ's groups once in a process."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def frozen_shard(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """This rank's shard of a frozen weight, and its values before torch's AdamW had an engine."""
    import deepspeed

    stand_in()
    model = new_model()
    frozen = model.get_input_embeddings().weight  # type: ignore[operator]
    frozen.requires_grad_(False)
    before = frozen.detach().flatten().chunk(world_size)[rank].clone()
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_quantized_nontrainable_weights": True}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    deepspeed.initialize(model=model, optimizer=adamw, config=config)
    return frozen.ds_tensor.detach().clone(), before
