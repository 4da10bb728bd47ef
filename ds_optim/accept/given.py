"""A small model whose gradients are given: what an optimizer is fed is known to the bit on every device and rank.

Its loss is the sum of every weight times a number, so that the numbers are the gradients. They have 8 bits of mantissa,
and the ranks' shares are 0 or 2 times them: means over any power of two of ranks are exact, in whatever order they are
added and in whatever dtype they travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.optimizers.registry import DESCRIBED
from ds_optim.optimizers.rules import RULES, Rule

_WIDTH, _VOCABULARY = 72, 40
STEPS = 3
Gradients = dict[str, Tensor]


class Given(nn.Module):
    """An embedding, two layers of linear modules with biases and norms, and a head; odd shapes among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(_VOCABULARY, _WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": _Linear(_WIDTH, _WIDTH),
                    "up_proj": _Linear(_WIDTH, 3 * _WIDTH, bias=False),
                    "down_proj": _Linear(3 * _WIDTH, _WIDTH, bias=False),
                    "odd_proj": _Linear(_WIDTH, 7),
                    "norm": _Norm(_WIDTH),
                }
            )
            for _ in range(2)
        )
        self.lm_head = _Linear(_WIDTH, _VOCABULARY, bias=False)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float32, device="cpu") * 0.1)

    def forward(self, gradients: Gradients) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=next(iter(gradients.values())).device)
        for path, module in self.named_modules():
            if isinstance(module, _Embedding | _Linear | _Norm):
                names = [name for name, _ in module.named_parameters()]
                total = total + module([gradients[f"{path}.{name}"] for name in names])
        return total


def _product(module: nn.Module, gradients: list[Tensor]) -> Tensor:
    pairs = zip(module.parameters(), gradients, strict=True)
    return torch.stack([(p.float() * g).sum() for p, g in pairs]).sum()


class _Embedding(nn.Embedding):
    def forward(self, gradients: Any) -> Tensor:
        return _product(self, gradients)


class _Linear(nn.Linear):
    def forward(self, gradients: Any) -> Tensor:
        return _product(self, gradients)


class _Norm(nn.LayerNorm):
    def forward(self, gradients: Any) -> Tensor:
        return _product(self, gradients)


def new_model() -> Given:
    """Always the same weights, on the CPU in fp32, whatever torch's defaults."""
    with torch.device("cpu"):
        return Given().float()


def gradients(step: int, device: torch.device) -> Gradients:
    """Of a step, by name: normal with a drift."""
    found = {}
    for number, (name, p) in enumerate(new_model().named_parameters()):
        noise, drift = (torch.Generator().manual_seed(seed) for seed in (1000 * (step + 1) + number, number))
        drawn = (torch.randn(p.shape, generator=g, dtype=torch.float32, device="cpu") for g in (noise, drift))
        found[name] = torch.stack([*drawn]).sum(0).bfloat16().float().to(device)
    return found


def share_of(rank: int, ranks: int) -> float:
    """What a rank's gradient is in units of the mean."""
    return 1.0 if ranks == 1 else 2.0 * (rank < ranks // 2)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An optimizer under one of its rules, with one dtype of momentum."""

    name: str
    type: str
    rule: Rule
    params: dict[str, Any] = field(default_factory=dict)
    momentum_dtype: str = "float32"

    @property
    def arguments(self) -> dict[str, Any]:
        """As its class and a DeepSpeed JSON take them; matrices are worked on in fp32, so that limits are narrow."""
        found = dict(self.params)
        if self.momentum_dtype != "float32":
            found["momentum_dtype"] = self.momentum_dtype
        if self.rule.shape is not None:
            found["polar"] = {"dtype": "float32"}
        return found


def subjects(momenta: tuple[str, ...] = ("float32",)) -> Iterator[Subject]:
    """Every optimizer that is registered, once for each rule that an option of it chooses and each momentum dtype."""
    for name, described in DESCRIBED.items():
        for chosen, rule in described.rules.items():
            key, _, value = chosen.partition(": ")
            option = {key: json.loads(value)} if chosen else {}
            title = ", ".join([name, *([chosen] if chosen else [])])
            for dtype in momenta if RULES[rule].narrow else ("float32",):
                yield Subject(name=title, type=name, rule=RULES[rule], params=option, momentum_dtype=dtype)


def step_alone(subject: Subject, device: torch.device) -> dict[str, Tensor]:
    """The weights that the unsharded optimizer reaches on ``device``, on the CPU."""
    import ds_optim

    model = new_model().to(device)
    optimizer = DESCRIBED[subject.type].cls(ds_optim.param_groups(model), **subject.arguments)
    for step in range(STEPS):
        given = gradients(step, device)
        for name, p in model.named_parameters():
            p.grad = given[name]
        optimizer.step()
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest distance of two results relative to the way that the second went, and the parameter of it."""
    start = {name: p.detach() for name, p in new_model().named_parameters()}
    found = {}
    for name, weights in other.items():
        way = (weights.double() - start[name].double()).norm()
        apart = (one[name].double() - weights.double()).norm()
        found[name] = float(apart / way) if apart else 0.0
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
    return found[worst], worst
