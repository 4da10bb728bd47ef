"""The losses of some steps under a setting of DeepSpeed's: what the rows of tests/settings.py are trained by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tests.settings import Setting

from .harness import device
from .models import batch, share
from .training import GLOBAL_BATCH, Run, start_engine

STEPS = 20
PARAMS: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"lr": 1e-2},
    "LionMuon": {"lr": 1e-2, "sign_lr_ratio": 0.3, "polar": {"dtype": "float32"}},
}
"""Rates at which both learn the one batch by heart in about as many steps."""


def of_small_net(
    rank: int, world_size: int, setting: Setting, stage: int, type: str, steps: int = STEPS, zero_init: bool = False
) -> list[float]:
    """The mean loss over all ranks at every step, on one global batch that is the same at each.

    type: one of ours, or "AdamW" for torch's own under DeepSpeed.
    """
    run = run_of(setting, stage, type, zero_init=zero_init)
    engine, _ = start_engine(run, world_size)
    tokens, targets = batch(0, GLOBAL_BATCH)
    losses = []
    for _ in range(steps):
        found = []
        for micro in range(run.accumulation):
            x, y = share(tokens, targets, rank, world_size, micro, run.accumulation)
            loss = engine(x.to(device()), y.to(device()))
            engine.backward(loss)
            engine.step()
            found.append(loss.detach())
        losses.append(mean_over_ranks(torch.stack(found).mean()))
    engine.destroy()
    return losses


def under_zero_init(rank: int, world_size: int, setting: Setting, stage: int, type: str) -> list[float]:
    """The same of a model that is made under ``deepspeed.zero.Init``."""
    return of_small_net(rank, world_size, setting, stage, type, zero_init=True)


def run_of(setting: Setting, stage: int, type: str, **more: Any) -> Run:
    """A setting as a run of tests/distributed/training.py."""
    config = dict(setting.config)
    zero = config.pop("zero_optimization", {})
    accumulation = config.pop("gradient_accumulation_steps", 1)
    clip = config.pop("gradient_clipping", 0.0)
    dtype = next((name for name in ("bf16", "fp16") if name in config), "fp32")
    more |= {"accumulation": accumulation, "clip": clip, "dtype": dtype, "zero": zero, "config": config}
    return Run(type=type, params=PARAMS[type], stage=stage, **more)


def mean_over_ranks(loss: torch.Tensor) -> float:
    """A rank's loss, meant over all of them."""
    total = loss.detach().float().reshape(1).clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
