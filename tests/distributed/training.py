"""Train one small model by plain torch or by DeepSpeed, and hand over weights and gradients in full.

What a run under ZeRO did is put together from the flat partitions that its optimizer was stepped with, by
the layout's closed form, so that any optimizer can be looked at, torch's own included.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.sharding.layout import Layout, build_layout

from .harness import device
from .models import WIDTH, TinyNet, batch, share

STEPS = 10
GLOBAL_BATCH = 36
"""Sequences a step: they divide among 1 to 4 ranks, and each rank's among 3 micro-steps."""
_SMALL_BUCKETS = {
    "reduce_bucket_size": 20_000,
    "allgather_bucket_size": 20_000,
    "stage3_prefetch_bucket_size": 20_000,
}
"""DeepSpeed's defaults reserve gigabytes whatever the model."""

Weights = dict[str, Tensor]
GivenGradients = Callable[[int], Weights]
"""Step -> full gradients by name."""


class ParityNet(TinyNet):
    """TinyNet with a branch behind the embedding: neck (7, 24) and (7,), odd (5, 7), back (24, 5).

    35 and 7 divide by no world size, so that partitions end in padding at 2, 3 and 4 ranks and stages 1 to 3.
    """

    def __init__(self, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__(tied=tied, seed=seed)
        self.neck = nn.Linear(WIDTH, 7)
        self.odd = nn.Linear(7, 5, bias=False)
        self.back = nn.Linear(5, WIDTH, bias=False)
        self.embed.register_forward_hook(lambda _, __, x: x + self.back(torch.tanh(self.odd(self.neck(x)))))
        self.reset(seed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: an optimizer's type and params as in the JSON, and where and how it trains.

    ``type`` "AdamW" is torch's own. ``zero`` goes into ``zero_optimization``, ``config`` beside it.
    ``zero_init``: the model is made under ``deepspeed.zero.Init``. ``mpu``: what DeepSpeed is handed beside it.
    """

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)
    stage: int = 0
    dtype: str = "fp32"
    accumulation: int = 1
    clip: float = 0.0
    steps: int = STEPS
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    mpu: Any = None

    def json(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed config, the optimizer left out."""
        loaded: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage, **_SMALL_BUCKETS, **self.zero},
            **self.config,
        }
        if self.dtype == "bf16":
            loaded["bf16"] = {"enabled": True, **self.config.get("bf16", {})}
        return loaded


@dataclass
class Trained:
    """What came of a run: fp32 (master) weights, and for each step the gradients that the optimizer got.

    ``raw_norms``: of the gradient before clipping, where plain training could see it.
    """

    weights: Weights
    gradients: list[Weights]
    optimizer: torch.optim.Optimizer
    raw_norms: list[float] = field(default_factory=list)


def new_model(dtype: str) -> ParityNet:
    model = ParityNet()
    return model.bfloat16() if dtype == "bf16" else model


def initial_weights(dtype: str) -> Weights:
    """The fp32 weights that a run starts from."""
    return {name: p.detach().float() for name, p in new_model(dtype).named_parameters()}


def random_gradients(step: int) -> Weights:
    """Normal gradients with a drift, of full mantissas, that need no model to be found."""
    entries = {}
    for number, (name, start) in enumerate(initial_weights("fp32").items()):
        noise = torch.Generator().manual_seed(1000 * step + number)
        drift = torch.Generator().manual_seed(number)
        entries[name] = torch.randn(start.shape, generator=noise) + 0.5 * torch.randn(start.shape, generator=drift)
    return entries


# ----------------------------------------------------------------------------------------------- unsharded


def build_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run over a model's parameters; AdamW in the same groups as the others."""
    groups = ds_optim.param_groups(model)
    if run.type == "AdamW":
        return torch.optim.AdamW([{"params": group["params"]} for group in groups], **run.params)
    optimizer: torch.optim.Optimizer = getattr(ds_optim, run.type)(groups, **run.params)
    return optimizer


def train_plain(run: Run, given: GivenGradients | None = None) -> Trained:
    """The same training in one process with nothing but torch: fp32 masters of 16-bit weights by hand."""
    working, masters = new_model(run.dtype), new_model(run.dtype).float()
    optimizer = build_optimizer(run, masters)
    history: list[Weights] = []
    raw_norms: list[float] = []
    for step in range(run.steps):
        if given is None:
            working.zero_grad()
            working(*batch(step, GLOBAL_BATCH)).backward()
            gradients = {n: p.grad.float().clone() for n, p in working.named_parameters() if p.grad is not None}
        else:
            gradients = given(step)
        for name, p in masters.named_parameters():
            p.grad = gradients.get(name)
        raw_norms.append(total_norm(gradients))
        if run.clip:
            nn.utils.clip_grad_norm_(masters.parameters(), run.clip)
        history.append({n: p.grad.clone() for n, p in masters.named_parameters() if p.grad is not None})
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters.parameters(), working.parameters(), strict=True):
                p.copy_(master)
    return Trained(_weights(masters), history, optimizer, raw_norms)


def replay(run: Run, gradients: Sequence[Weights]) -> Weights:
    """The weights that a run's optimizer reaches, unsharded, when it is handed these gradients."""
    model = new_model(run.dtype).float()
    optimizer = build_optimizer(run, model)
    for entry in gradients:
        for name, p in model.named_parameters():
            p.grad = entry[name].clone()
        optimizer.step()
    return _weights(model)


def total_norm(gradients: Weights) -> float:
    """The norm of all of them as one vector."""
    return float(torch.stack([g.double().norm() for g in gradients.values()]).norm())


def _weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------- DeepSpeed


def start_engine(run: Run, world_size: int) -> tuple[Any, ParityNet]:
    """An engine for the run, through ``ds_optim.initialize``."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # What the parent imported is no garbage: ZeRO-3's collections need not look at it each time.
    gc.freeze()
    config = run.json(world_size)
    if run.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = new_model(run.dtype)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.reset(0)
    else:
        model = new_model(run.dtype).to(device())
    if run.type == "AdamW":
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(run, model), config=config, mpu=run.mpu
        )
    else:
        config["optimizer"] = {"type": run.type, "params": dict(run.params)}
        engine, *_ = ds_optim.initialize(model=model, config=config, mpu=run.mpu)
    return engine, model


def train_sharded(
    run: Run,
    rank: int,
    world_size: int,
    given: GivenGradients | None = None,
    inspect: Callable[[Any, Layout], None] | None = None,
) -> Trained:
    """Train under DeepSpeed; weights and gradients in full on rank 0, none on the others.

    given: what to put into the flat partitions in place of the gradients that ZeRO reduced. inspect: is
    called at the end of the training with the engine and the layout.
    """
    engine, model = start_engine(run, world_size)
    layout = layout_of(run, world_size)
    recorder = Recorder(engine.basic_optimizer, layout, rank, given)
    for step in range(run.steps):
        take_step(engine, run, rank, world_size, step)
    trained = recorder.collect()
    _check_model(run, model, trained.weights, rank)
    if inspect is not None:
        inspect(engine, layout)
    engine.destroy()
    return trained


def take_step(engine: Any, run: Run, rank: int, world_size: int, step: int) -> None:
    """One step on the rank's share of the global batch."""
    tokens, targets = batch(step, GLOBAL_BATCH)
    for micro in range(run.accumulation):
        x, y = share(tokens, targets, rank, world_size, micro, run.accumulation)
        engine.backward(engine(x.to(device()), y.to(device())))
        engine.step()


def layout_of(run: Run, world_size: int) -> Layout:
    """The closed form of where a run's elements lie."""
    routed = ds_optim.param_groups(ParityNet())
    groups = [[member.spec for member in group[MEMBERS]] for group in routed]
    if run.params.get("spread"):  # which cuts the groups of matrices
        groups = [[m.spec for m in members] for members in getattr(ds_optim, run.type)(routed, **run.params).members]
    size = run.zero.get("sub_group_size")
    robin = bool(run.zero.get("round_robin_gradients"))
    return build_layout(groups, stage=run.stage, world_size=world_size, sub_group_size=size, round_robin=robin)


class Recorder:
    """Keeps the gradients that an optimizer is stepped with, and knows the tensors that it steps.

    ZeRO steps units in the layout's order, so that tensors are told apart by their first appearance.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, layout: Layout, rank: int, given: GivenGradients | None = None
    ) -> None:
        self.optimizer = optimizer
        self.layout = layout
        self.rank = rank
        self.given = given
        self.tensors: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                number = next((i for i, t in enumerate(self.tensors) if t is tensor), len(self.tensors))
                if number == len(self.tensors):
                    self.tensors.append(tensor)
                    self.gradients.append([])
                if self.given is not None:
                    self._replace(number, tensor.grad, self.given(len(self.gradients[number])))
                self.gradients[number].append(tensor.grad.detach().float().clone())

    def _replace(self, number: int, gradient: Tensor, full: Weights) -> None:
        places = [(u, i) for u in self.layout.units for i in range(len(u.params) if u.cut == "none" else 1)]
        unit, tensor = places[number]
        for piece in unit.slices(self.rank):
            if piece.tensor == tensor:
                values = full[unit.params[piece.param].name].flatten()[piece.start : piece.start + piece.numel]
                gradient.view(-1)[piece.offset : piece.offset + piece.numel].copy_(values)

    def collect(self) -> Trained:
        """Gather the ranks' partitions and cut them up by parameter."""
        steps = len(self.gradients[0])
        history: list[Weights] = [{} for _ in range(steps)]
        weights: Weights = {}
        rows = (
            torch.stack([*gradients, tensor.detach().float()]).flatten(1)
            for gradients, tensor in zip(self.gradients, self.tensors, strict=True)
        )
        for unit in self.layout.units:
            if unit.cut == "none":
                everywhere = [[next(rows) for _ in unit.params]]
            else:
                everywhere = [[part] for part in _gather(next(rows), self.rank, unit.world_size)]
            for param, spec in enumerate(unit.params if self.rank == 0 else ()):
                full = torch.full((steps + 1, spec.numel), float("nan"))
                for owner, piece in unit.holders(param):
                    held = everywhere[owner][piece.tensor][:, piece.offset : piece.offset + piece.numel]
                    full[:, piece.start : piece.start + piece.numel] = held.cpu()
                for entry, values in zip([*history, weights], full, strict=True):
                    entry[spec.name] = values.view(spec.shape)
        return Trained(weights, history, self.optimizer)


def _gather(local: Tensor, rank: int, world_size: int) -> list[Tensor]:
    """A tensor from every rank, on rank 0."""
    if world_size == 1:
        return [local]
    everywhere = [torch.empty_like(local) for _ in range(world_size)] if rank == 0 else None
    dist.gather(local.contiguous(), everywhere)
    return everywhere or []


def _check_model(run: Run, model: nn.Module, masters: Weights, rank: int) -> None:
    """The model itself holds the masters, cast down: a step that moved masters alone would train nothing."""
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if run.stage == 3 else contextlib.nullcontext():
        for name, p in model.named_parameters():
            if rank == 0 and not torch.equal(p.detach().cpu(), masters[name].to(p.dtype)):
                raise AssertionError(f"{name} in the model is not the master weight, cast to {p.dtype}")
