"""A model that is large enough for DeepSpeed to write its partitions to files, and engines over it.

DeepSpeed writes no sub-group below 1 MiB: two matrices are larger than that on each of two ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from tests.settings import Setting

from .losses import STEPS, mean_over_ranks
from .small_runs import quiet

INPUTS, HIGH = 514, 1026
"""Two ranks share them without padding, whose bits nobody sets; a slice of the first fills no whole KiB."""
SUB_GROUPS = 250_000
"""Elements: of the first large matrix, and of the small one with the second."""
WIDE = 1024
"""Of the small matrix, where weights are to be in files: two bf16 matrices are large enough for it then."""
PARAMS: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"lr": 3e-4},
    "LionMuon": {"lr": 1e-3, "polar": {"steps": 3, "dtype": "float32"}},
}


def skip_without_aio() -> None:
    """Leave a test out where DeepSpeed's op cannot be built."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io does not build here: install libaio-dev")


class Net(nn.Module):
    """Two large matrices, a small one that only some steps use, and a last layer with a bias.

    width: of the small one, before the second large one in its sub-group. With 514 that begins between two blocks.
    """

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(INPUTS, HIGH, bias=False)
        self.spare = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(HIGH, width, bias=False)
        self.last = nn.Linear(width, 8)

    def forward(self, x: Tensor, spare: bool) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(x + self.spare(x) if spare else x)


def weights_at(place: str) -> dict[str, Any]:
    """What a config's ``zero_optimization`` says for weights in files under ``place``, of partitions that are small."""
    few = {"buffer_count": 8, "buffer_size": 600_000, "max_in_cpu": 0}
    there = {"device": "nvme", "nvme_path": place, "pin_memory": False, **few}
    return {"offload_param": there, "stage3_prefetch_bucket_size": 0}


def config_of(
    place: str | None, type: str, params: Mapping[str, Any], dtype: str, *, weights: bool = False, **offload: Any
) -> dict[str, Any]:
    """A config with state in files under ``place``, or without one in the host's memory. weights: in files too."""
    where = {"device": "cpu"} if place is None else {"device": "nvme", "nvme_path": place}
    zero = {
        "stage": 3,
        "sub_group_size": SUB_GROUPS,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 100_000,
        "offload_optimizer": {**where, "pin_memory": False, **({} if place is None else offload)},
        **(weights_at(str(place)) if weights else {}),
    }
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": type.startswith("deepspeed:"),
        "optimizer": {"type": type, "params": {"lr": 1e-3, **params}},
    }
    return config | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})


def start(config: dict[str, Any], width: int = 512) -> Any:
    """An engine of it; AdamW is torch's."""
    quiet()
    model = Net(width)
    model = model.bfloat16() if "bf16" in config else model
    if config["optimizer"]["type"] != "AdamW":
        return ds_optim.initialize(model=model, config=config)[0]
    adamw = torch.optim.AdamW(model.parameters(), **config.pop("optimizer")["params"])
    return ds_optim.initialize(model=model, config={**config, "zero_allow_untested_optimizer": True}, optimizer=adamw)[
        0
    ]


def take_steps(engine: Any, rank: int, which: range, *, same: bool = False) -> list[float]:
    """The losses; every other step leaves a matrix without a gradient. same: of one batch, and all matrices."""
    found = []
    for step in which:
        x = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed((0 if same else 100 * step) + rank))
        x = x.to(next(engine.module.parameters()).dtype)
        loss = (engine(x, same or step % 2 == 0) - x[:, :8]).float().square().mean()
        engine.backward(loss)
        if step % 2 and not same:
            forget_old(engine)
        engine.step()
        found.append(float(loss))
    return found


def forget_old(engine: Any) -> None:
    """In memory DeepSpeed hands over the last gradient of a parameter that has none now: zeros, as of one in files."""
    zero, spare = engine.optimizer, engine.module.spare.weight
    number, offset, numel = zero.grad_position[zero.get_param_id(spare)]
    gradient = zero.fp32_partitioned_groups_flat[number].grad
    if gradient is not None:  # in memory
        gradient.narrow(0, offset, numel).zero_()


def losses(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """As ``of_small_net`` of ``losses.py``, of this model."""
    assert stage == 3
    with tempfile.TemporaryDirectory() as folder:
        shared: list[Any] = [folder]
        torch.distributed.broadcast_object_list(shared)
        weights, dtype = (
            "offload_param" in setting.config["zero_optimization"],
            "bf16" if "bf16" in setting.config else "fp32",
        )
        config = config_of(shared[0], type, PARAMS[type], dtype, weights=weights)
        engine = start(config, WIDE if weights else 512)
        found = [mean_over_ranks(torch.tensor(loss)) for loss in take_steps(engine, rank, range(STEPS), same=True)]
        assert any(Path(shared[0]).rglob("*_param.tensor.swp" if weights else "*.swp"))
        engine.destroy()
        torch.distributed.barrier()
    return found
