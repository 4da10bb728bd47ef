"""Checkpoint folders made without DeepSpeed's engine: what a run without ZeRO saves is one dict in one file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.zero.checkpoints import Portable

STEPS = 3


class Tangle(nn.Module):
    """Matrices, vectors, an odd vocabulary, a tied head, a frozen matrix and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(29, 8)
        self.block = nn.Sequential(nn.Linear(8, 33), nn.LayerNorm(33), nn.Linear(33, 8, bias=False))
        self.frozen = nn.Linear(8, 3, bias=False).requires_grad_(False)
        self.register_buffer("table", torch.arange(5))
        self.lm_head = nn.Linear(8, 29, bias=False)
        self.lm_head.weight = self.embed.weight


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    """Take steps along gradients that are noise, the same for the same model and step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def own(name: str, model: nn.Module, **params: Any) -> torch.optim.Optimizer:
    polar = {"polar": {"steps": 2, "dtype": "float32"}} if OPTIMIZERS[name].has_aux else {}
    made: torch.optim.Optimizer = OPTIMIZERS[name](ds_optim.param_groups(model), **{**polar, **params})
    return made


def save_unsharded(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    **client: Any,
) -> Path:
    """What DeepSpeed's engine writes at stage 0 in fp32."""
    (folder / "step-3").mkdir(parents=True)
    (folder / "latest").write_text("step-3")
    state = {
        "module": model.state_dict(),
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": optimizer.state_dict(),
        **dict.fromkeys(["param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"]),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": STEPS,
        "global_samples": 24,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": dict(config or {}),
        "ds_version": "0.19.8",
        **client,
    }
    torch.save(state, folder / "step-3" / "mp_rank_00_model_states.pt")
    return folder


def content(portable: Portable) -> dict[tuple[str, str], Tensor]:
    """Everything of every parameter, whole, by parameter and what; int8 momentum as numbers."""
    from ds_optim.zero.checkpoints.pieces import values

    return {
        (spec.name, key): values(portable, spec.name, key, 0, spec.numel).clone()
        for spec in portable.specs
        for key in ("master", *portable.buffers[spec.name])
    }


def same_bits(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor], but: Sequence[str] = ()) -> list[Any]:
    """Keys whose values differ in a bit, or that one side lacks."""
    changed = set(one) ^ set(other)
    for key in set(one) & set(other):
        a, b = one[key].contiguous().view(-1), other[key].contiguous().view(-1)
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            changed.add(key)
    return sorted(key for key in changed if key[1] not in but)


def weights_of(path: Path) -> OrderedDict[str, Tensor]:
    found: OrderedDict[str, Tensor] = torch.load(path, weights_only=True)["module"]
    return found
