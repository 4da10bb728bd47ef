"""A small model with every kind of parameter, gradients for it, and plain training steps with no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ds_optim
from tests import reference

Grads = dict[str, Tensor]

MATRICES = ("tall.weight", "wide.weight", "square.weight", "conv.weight")
CONV_VIEW = {"conv.weight": (4, 12)}


class SmallModel(nn.Module):
    """Never called: tests set the gradients. Its weights are ``size`` times normal numbers."""

    def __init__(self, size: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.tall = nn.Linear(5, 13)
        self.wide = nn.Linear(17, 6, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.row = nn.Parameter(torch.empty(1, 9))
        self.dot = nn.Parameter(torch.empty(1, 1))
        self.conv = nn.Conv2d(3, 4, 2, bias=False)
        self.gain = nn.Parameter(torch.empty(7))
        values = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(size * torch.randn(p.shape, generator=values))


def random_grads(steps: int, seed: int = 1) -> list[Grads]:
    """Normal gradients with a drift of half their size, so that momentum means something."""
    values = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in SmallModel().named_parameters()}
    drift = {name: 0.5 * torch.randn(shape, generator=values) for name, shape in shapes.items()}
    return [
        {name: torch.randn(shape, generator=values) + drift[name] for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def constant_grads(value: float, steps: int) -> list[Grads]:
    return [{n: torch.full(p.shape, value) for n, p in SmallModel().named_parameters()} for _ in range(steps)]


def warmup_cosine(steps: int, warmup: int = 10) -> list[float]:
    """Factors on the learning rate, none of them 0."""
    return [
        (t + 1) / warmup if t < warmup else 0.5 + 0.5 * math.cos(math.pi * (t - warmup) / (steps - warmup))
        for t in range(steps)
    ]


def build(name: str, model: nn.Module, **hyper: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(ds_optim, name)(ds_optim.param_groups(model), **hyper)
    return optimizer


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    grads: Iterable[Mapping[str, Tensor]],
    schedule: Sequence[float] | None = None,
) -> None:
    """One step for each entry; a parameter that an entry does not name gets no gradient."""
    base = [group["lr"] for group in optimizer.param_groups]
    for index, entry in enumerate(grads):
        for name, p in model.named_parameters():
            p.grad = entry[name].clone() if name in entry else None
        if schedule is not None:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule[index]
        optimizer.step()


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of the weights, in fp64."""
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def trained(
    name: str,
    grads: Sequence[Grads],
    size: float = 1.0,
    schedule: Sequence[float] | None = None,
    **hyper: Any,
) -> dict[str, np.ndarray]:
    """The weights of a SmallModel after ``grads`` under ``ds_optim.<name>``."""
    model = SmallModel(size)
    take_steps(model, build(name, model, **hyper), grads, schedule)
    return weights_of(model)


def referred(
    name: str,
    grads: Sequence[Grads],
    size: float = 1.0,
    schedule: Sequence[float] | None = None,
    observe: reference.Observer | None = None,
    **hyper: Any,
) -> dict[str, np.ndarray]:
    """The same by the reference, from the same fp32 bits."""
    entries = [{key: g.double().numpy() for key, g in entry.items()} for entry in grads]
    # As in the package: a convolution's output channels are the rows.
    hyper = {**hyper, "matrix_views": CONV_VIEW}
    return reference.run(name, weights_of(SmallModel(size)), entries, hyper, schedule, observe)
