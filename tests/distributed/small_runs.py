"""Engines over a small model: how the tests of robustness start, step and look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers import ZeroOptimizer

from .harness import device
from .models import TinyNet, batch, share

BATCH = 12
"""Sequences a step, over all ranks."""

Weights = dict[str, Tensor]

MUON = {"type": "Muon", "params": {"polar": {"steps": 3, "dtype": "float32"}}}
LION = {"type": "Lion", "params": {"lr": 1e-3}}
LION_MUON = {"type": "LionMuon", "params": {"period": 2, "polar": {"steps": 3, "dtype": "float32"}}}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of settings; ``zero`` and ``config`` go into the JSON as they are."""

    stage: int
    dtype: str = "fp32"
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([f"z{self.stage}", self.dtype, *map(str, self.zero.items()), *map(str, self.config.items())])

    def json(self, world_size: int, optimizer: Mapping[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH // world_size,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.stage, **small_buffers(self.stage), **self.zero},
            **self.config,
        }
        if optimizer is not None:
            config["optimizer"] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in optimizer.items()}
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True, **config.get(self.dtype, {})}
        return config


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ROUND_ROBIN = {"round_robin_gradients": True}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}

CELLS = [
    *(Cell(stage=stage, dtype=dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")),
    *(Cell(stage=stage, zero=OFFLOAD) for stage in (1, 2, 3)),
    Cell(stage=2, dtype="bf16", zero=OFFLOAD),
    Cell(stage=3, dtype="bf16", zero=OFFLOAD),
    Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
    Cell(stage=3, zero={"sub_group_size": 400}),
    Cell(stage=3, zero={"sub_group_size": 1, **OFFLOAD}),
]
"""Every wrapper of DeepSpeed's, with one sub-group and with several."""


def small_buffers(stage: int) -> dict[str, Any]:
    """Buckets that a small model fills, and at stage 3 parameters that are cut however small they are."""
    sizes: dict[str, Any] = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
    if stage == 3:
        sizes |= {"stage3_prefetch_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    return sizes


def quiet() -> None:
    import deepspeed

    deepspeed.logger.setLevel("ERROR")


def new_model(dtype: str = "fp32", *, tied: bool = False) -> nn.Module:
    model = TinyNet(tied=tied)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return model.to(device(), kinds[dtype])


def start(cell: Cell, world_size: int, optimizer: Mapping[str, Any] = MUON, model: nn.Module | None = None) -> Any:
    """An engine by ``ds_optim.initialize``."""
    quiet()
    model = new_model(cell.dtype) if model is None else model
    return ds_optim.initialize(model=model, config=cell.json(world_size, optimizer))[0]


def one_step(engine: Any, step: int, rank: int, world_size: int, **inputs: Any) -> None:
    tokens, targets = share(*batch(step, BATCH), rank, world_size)
    engine.backward(engine(tokens.to(device()), targets.to(device()), **inputs))
    engine.step()


def own_optimizer(engine: Any) -> ZeroOptimizer:
    optimizer = engine.basic_optimizer
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer


def local_tensors(engine: Any) -> list[Tensor]:
    """What this rank's optimizer steps: flat partitions, or parameters where nothing is sharded."""
    wrapper = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapper, name):
            return list(getattr(wrapper, name))
    return [t for group in own_optimizer(engine).param_groups for t in group["params"]]


def snapshot(engine: Any) -> dict[str, Any]:
    """Copies of all that a step may move on this rank: weights of the model, masters, state, step counts."""
    held: dict[str, Any] = {}
    for name, p in engine.module.named_parameters():
        held[f"model {name}"] = getattr(p, "ds_tensor", p).detach().clone()
    for number, tensor in enumerate(local_tensors(engine)):
        held[f"master {number}"] = tensor.detach().clone()
        for key, value in own_optimizer(engine).state.get(tensor, {}).items():
            # Rows and numbers of parameters stand in dicts, which go on changing.
            for name, one in value.items() if isinstance(value, dict) else [("", value)]:
                held[f"{key} {number} {name}".strip()] = one.detach().clone() if isinstance(one, Tensor) else one
    return held


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not bit for bit the same; what one side lacks is a difference."""
    changed = sorted(set(before) ^ set(after))
    for key in sorted(set(before) & set(after)):
        old, new = before[key], after[key]
        same = torch.equal(bits(old), bits(new)) if isinstance(old, Tensor) else old == new
        if not same:
            changed.append(key)
    return changed


def bits(values: Tensor) -> Tensor:
    """A tensor's bytes, so that a NaN equals itself and -0 is not 0."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


def identical(one: Tensor | None, other: Tensor | None) -> bool:
    """Bit for bit the same, or both missing."""
    if one is None or other is None:
        return one is other
    return torch.equal(bits(one), bits(other))


def full_weights(engine: Any) -> Weights:
    """The model's weights in full, in its own dtype, on every rank."""
    import deepspeed

    weights: Weights = {}
    for name, p in engine.module.named_parameters():
        if hasattr(p, "ds_tensor"):
            with deepspeed.zero.GatheredParameters(p):
                weights[name] = p.detach().clone().cpu()
        else:
            weights[name] = p.detach().clone().cpu()
    return weights


def equal(one: Weights, other: Weights) -> list[str]:
    """Names whose weights differ in a bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(bits(one[name]), bits(other[name]))]


def trained_weights(engine: Any, steps: Iterable[int], rank: int, world_size: int) -> Weights:
    for step in steps:
        one_step(engine, step, rank, world_size)
    return full_weights(engine)
