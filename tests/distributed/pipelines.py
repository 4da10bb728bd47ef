"""A small model in DeepSpeed's pipeline: five layers on two stages, the first and the last of them tied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optim
from tests.settings import Setting

from .losses import PARAMS, STEPS
from .models import VOCABULARY, WIDTH, batch, share
from .training import GLOBAL_BATCH

MICRO = 2
"""Batches of a step."""


class Block(nn.Module):
    """(B, T, WIDTH) -> the same."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + mixed


def put_out(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def new_model(stages: int = 2, *, tied: bool = True) -> Any:
    """A ``PipelineModule``; the same weights whatever the number of stages."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    blocks = [LayerSpec(Block, inner) for inner in (48, 24, 72)]
    if tied:
        first = TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH)
        last = TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=put_out)
    else:
        first = LayerSpec(nn.Embedding, VOCABULARY, WIDTH)
        last = LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    layers = [first, *blocks, last]
    model = PipelineModule(
        layers, num_stages=stages, loss_fn=loss_of, partition_method="uniform", seed_layers=True, base_seed=7
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.2 / float(parameter.std()))
    return model


def start(
    world_size: int,
    type: str,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    stages: int = 2,
    tied: bool = True,
) -> Any:
    """A pipeline's engine; type "AdamW" is torch's own."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    model = new_model(stages, tied=tied)
    ranks = world_size // stages
    json: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks // MICRO,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.0,
        **config,
    }
    if type == "AdamW":
        groups = [{"params": group["params"]} for group in ds_optim.param_groups(model)]
        json |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, **params), config=json)[0]
    json["optimizer"] = {"type": type, "params": dict(params)}
    return ds_optim.initialize(model=model, config=json)[0]


def batches(engine: Any, first: int = 0, *, same: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every micro-batch from a step on; same: of the first step's again and again."""
    ranks, rank = engine.grid.get_data_parallel_world_size(), engine.grid.get_data_parallel_rank()
    step = first
    while True:
        for micro in range(MICRO):
            yield share(*batch(step, GLOBAL_BATCH), rank, ranks, micro, MICRO)
        step += not same


def losses(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """As ``of_small_net`` of losses.py."""
    engine = start(world_size, type, PARAMS[type], setting.config_at(stage))
    data = batches(engine, same=True)
    found = [float(engine.train_batch(data)) for _ in range(STEPS)]
    engine.destroy()
    return found
