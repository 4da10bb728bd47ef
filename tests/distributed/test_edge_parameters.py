"""Frozen, tied, unused, empty and tiny parameters, offload and odd settings: always the unsharded result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optim
from tests.tiers import cells

from .harness import device, run_ranks
from .small_runs import (
    FP32_ACCUMULATION,
    LION,
    MUON,
    OFFLOAD,
    Cell,
    Weights,
    differences,
    full_weights,
    local_tensors,
    own_optimizer,
    quiet,
)

pytestmark = pytest.mark.full

STEPS = 4
INPUTS = 6


class Net(nn.Module):
    """(B, 6) -> (B, 6) by parameters of every kind; which of them, a test chooses by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 11)
        self.second = nn.Linear(11, INPUTS)
        self.norm = nn.LayerNorm(INPUTS)
        self.reset()

    def reset(self) -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator) + float("norm.weight" in name))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(torch.tanh(self.first(x))))


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)


class FrozenVectors(Net):
    """All that would be in the group "vector" is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.requires_grad_(p.ndim == 2)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(INPUTS, 11, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(torch.tanh(self.third(x)), self.third.weight.T)


class Unused(Net):
    """A matrix and a vector that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(5, 7)
        self.reset()


class Empty(Net):
    """Parameters without elements, among the matrices and among the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Linear(0, 5, bias=False)
        self.nil = nn.Parameter(torch.empty(0))
        self.last = nn.Linear(INPUTS, INPUTS, bias=False)
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last(x)


class Tiny(nn.Module):
    """Three elements in all, in one vector and one of 1x1, which is no matrix: fewer than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.dot = nn.Parameter(torch.tensor([[0.75]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] * self.gain, x[:, 2:] * self.dot], dim=1)


class VectorsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(INPUTS)
        self.shift = nn.Parameter(0.1 * torch.arange(INPUTS).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.shift


class NormOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the optimizer that trains it, and the settings under which it does."""

    model: Callable[[], nn.Module]
    cell: Cell
    optimizer: Mapping[str, Any] = field(default_factory=lambda: MUON)
    zero_init: bool = False

    @property
    def label(self) -> str:
        init = " zero.Init" if self.zero_init else ""
        return f"{self.model.__name__} {self.optimizer['type']} {self.cell.label}{init}"


def data(step: int) -> Tensor:
    return torch.randn(12, INPUTS, generator=torch.Generator().manual_seed(50 + step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return (output - x.roll(1, dims=1)).square().mean()


def train(case: Case, rank: int, world_size: int) -> tuple[Weights, dict[str, Any]]:
    """Weights after some steps under DeepSpeed, and facts about the optimizer's state on this rank."""
    import deepspeed

    quiet()
    kind = torch.bfloat16 if case.cell.dtype == "bf16" else torch.float32
    config = case.cell.json(world_size, case.optimizer)
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path={**config, "optimizer": {"type": "AdamW"}}):
            model = case.model()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.reset()  # type: ignore[operator]
    else:
        model = case.model().to(device(), kind)
    engine = ds_optim.initialize(model=model, config=config)[0]
    for step in range(STEPS):
        x = data(step)[rank::world_size].to(device(), kind)
        engine.backward(loss_of(engine, x))
        engine.step()
    optimizer = own_optimizer(engine)
    tensors = local_tensors(engine)
    facts = {
        "steps": sorted({optimizer.state[t]["step"] for t in tensors if t in optimizer.state}),
        "state": sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)),
        "elements": sum(t.numel() for t in tensors),
    }
    weights = full_weights(engine)
    engine.destroy()
    return weights, facts


def train_plain(case: Case) -> Weights:
    """The same training with no DeepSpeed, fp32."""
    model = case.model()
    params = dict(case.optimizer["params"])
    optimizer = getattr(ds_optim, case.optimizer["type"])(ds_optim.param_groups(model), **params)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, data(step)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def cases_at(world_size: int) -> list[Case]:
    """Every model at every stage, and the settings of DeepSpeed that change who holds what, when."""
    stages = [Cell(stage=s) for s in (0, 1, 2, 3)]
    cases = [Case(model=m, cell=c) for m in (Tiny, VectorsOnly, NormOnly) for c in stages]
    cases += [Case(model=Tiny, cell=c, optimizer=LION) for c in stages]
    if world_size == 4:
        return cases
    cases += [Case(model=m, cell=c) for m in (Net, Frozen, FrozenVectors, Tied, Unused) for c in stages]
    cases += [Case(model=Empty, cell=c) for c in stages[:3]]  # DeepSpeed itself fails on them at stage 3
    cases += [Case(model=m, cell=c, optimizer=LION) for m in (Frozen, FrozenVectors) for c in stages]
    for model in (Unused, Tied):
        cases += [Case(model=model, cell=Cell(stage=s, zero=OFFLOAD)) for s in (1, 2, 3)]
    plain = {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False}
    settings: list[tuple[int, dict[str, Any]]] = [
        *((s, {key: value}) for s in (1, 2, 3) for key in plain for value in (True, False)),
        *((s, plain) for s in (1, 2, 3)),
        *((s, {"parameter_alignment": True}) for s in (1, 2)),
        (2, {"parameter_alignment": True, **OFFLOAD}),
        *((s, {"round_robin_gradients": True, "parameter_alignment": a}) for s in (1, 2) for a in (False, True)),
        (2, {"round_robin_gradients": True, **OFFLOAD}),
        *((3, {"sub_group_size": size}) for size in (1, 30, 70, 0)),
        (3, {"sub_group_size": 1, **OFFLOAD}),
        (3, {"offload_param": {"device": "cpu", "pin_memory": False}}),
        (3, {"offload_param": {"device": "cpu", "pin_memory": False}, **OFFLOAD}),
        (3, {"stage3_param_persistence_threshold": 100000}),
        (2, {"cpu_offload": True, "cpu_offload_use_pin_memory": False}),
    ]
    cases += [Case(model=Unused, cell=Cell(stage=s, zero=zero)) for s, zero in settings]
    cases += [Case(model=m, cell=Cell(stage=3), zero_init=True) for m in (Net, Unused)]
    cases += [Case(model=Net, cell=Cell(stage=3, zero=OFFLOAD), zero_init=True)]
    more: list[dict[str, Any]] = [
        {"prescale_gradients": True},
        {"communication_data_type": "fp32"},
        {"gradient_allreduce_op": "mean"},
    ]
    cases += [Case(model=Net, cell=Cell(stage=1, zero={"reduce_scatter": False}, config=c)) for c in more]
    return cases


def train_all(rank: int, world_size: int, cases: list[Case]) -> list[tuple[Weights, dict[str, Any]] | str]:
    results: list[tuple[Weights, dict[str, Any]] | str] = []
    for case in cases:
        try:
            results.append(train(case, rank, world_size))
        except Exception as problem:  # the rest is still worth knowing; it is the same on all ranks or hangs
            results.append(f"{type(problem).__name__}: {problem}")
    return results


@pytest.mark.parametrize("world_size", cells([], [3, 4], [2]))
def test_unusual_parameters_train_as_without_sharding(world_size: int) -> None:
    cases = cases_at(world_size)
    for rank, results in enumerate(run_ranks(world_size, train_all, cases, timeout=300)):
        for case, result in zip(cases, results, strict=True):
            where = f"rank {rank}, {case.label}"
            assert not isinstance(result, str), f"{where}: {result}"
            weights, facts = result
            assert facts["steps"] == [STEPS], f"{where}: {facts}"
            assert facts["state"] == facts["elements"], f"{where}: one momentum an element, padding in both"
            expected, start = train_plain(case), dict(case.model().named_parameters())
            assert weights.keys() == expected.keys()
            for name, p in weights.items():
                moved = (expected[name] - start[name].detach()).norm()
                off = (p - expected[name]).norm()
                # DeepSpeed gives an unused parameter a zero gradient, plain torch none: it decays, by 1e-4 or less.
                decayed = 2 * STEPS * 1e-3 * start[name].detach().norm() if name.startswith("idle") else 0.0
                assert off <= 1e-3 * moved + decayed, f"{where}: {name} is {off:.2e} off, moved {moved:.2e}"
                if not start[name].requires_grad:
                    assert torch.equal(p, start[name].detach()), f"{where}: {name} is frozen and moved"


BF16 = [
    Cell(stage=1, config=FP32_ACCUMULATION),
    Cell(stage=2),
    Cell(stage=3),
    Cell(stage=3, zero={"sub_group_size": 1}),
]


def test_unusual_parameters_train_in_16_bits() -> None:
    cells = [replace(c, dtype="bf16") for c in (Cell(stage=0), *BF16)]
    cases = [Case(model=m, cell=c) for m in (Frozen, FrozenVectors, Tied, Unused, Tiny, NormOnly) for c in cells]
    cases += [Case(model=Empty, cell=c) for c in cells if c.stage < 3]
    for results in run_ranks(2, train_all, cases, timeout=300):
        for case, result in zip(cases, results, strict=True):
            assert not isinstance(result, str), f"{case.label}: {result}"
            weights, facts = result
            assert facts["steps"] == [STEPS], case.label
            assert facts["state"] == facts["elements"], case.label
            start = dict(case.model().bfloat16().named_parameters())
            for name, p in weights.items():
                assert p.isfinite().all(), f"{case.label}: {name}"
                still = torch.equal(p, start[name].detach())
                if not start[name].requires_grad:
                    assert still, f"{case.label}: {name} is frozen and moved"
                elif p.ndim == 2 and p.numel() > 1 and not name.startswith("idle"):
                    assert not still, f"{case.label}: {name} stands still"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_frozen_after_its_gradient_is_stepped_with_it(stage: int, tied: bool) -> None:
    """As in DeepSpeed's own tests of unbalanced gradients: every other parameter is frozen behind the backward pass."""
    for outcome in run_ranks(2, freeze_late, stage, tied):
        assert outcome == []


def freeze_late(rank: int, world_size: int, stage: int, tied: bool) -> list[str]:
    """Where the weights differ from those of the same step without any freezing."""
    quiet()
    stepped = []
    for late in (False, True):
        torch.manual_seed(0)
        model = (Tied if tied else Net)().to(device())
        engine = ds_optim.initialize(model=model, config=Cell(stage=stage).json(world_size, MUON))[0]
        engine.backward(loss_of(engine, data(0)[rank::world_size].to(device())))
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(not late)
        engine.step()
        stepped.append(full_weights(engine))
    return differences(*stepped)
