"""Runs that save, and runs of another shape that go on: what the tests of resharding compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim import load_checkpoint
from ds_optim.elementwise.momentum import Int8
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.matrix.views import row_range
from ds_optim.sharding.layout import Layout, build_layout
from ds_optim.sharding.lines import blocks_of

from .harness import device
from .models import TinyNet, batch, share
from .small_runs import BATCH, LION_MUON, Cell, local_tensors, own_optimizer, start

BEFORE, AFTER = 3, 2
SCHEDULE = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4, "total_num_steps": 9},
    }
}


def chosen(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": 1e-2, **params}}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An optimizer, the dtype of weights, settings at stage 3 and below, and what else the JSON says."""

    optimizer: Mapping[str, Any]
    dtype: str = "fp32"
    zero3: Mapping[str, Any] = field(default_factory=dict)
    flat: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sharded: bool = False
    """Whether stage 0 has no such thing."""

    @property
    def momentum_dtype(self) -> str:
        return str(self.optimizer["params"].get("momentum_dtype", "float32"))

    def cell(self, stage: int) -> Cell:
        zero = self.zero3 if stage == 3 else self.flat if stage else {}
        return Cell(stage=stage, dtype=self.dtype, zero=zero, config={**SCHEDULE, **self.config})


FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
KINDS = {
    "LionMuon": Kind(optimizer={**LION_MUON, "params": {**LION_MUON["params"], "weight_decay": 0.3}}),  # type: ignore[dict-item]
    "bf16 momentum": Kind(optimizer=chosen("Lion", momentum_dtype="bfloat16")),
    "int8 momentum": Kind(optimizer=chosen("LionMuon", momentum_dtype="int8", **FP32)),
    "scalars": Kind(optimizer=chosen("LASM", layer_scales={"square": 1.5})),
    "rows": Kind(optimizer=chosen("NorMuon", aux_lr=1e-3, **FP32)),
    "rows beside int8": Kind(optimizer=chosen("NorMuon", momentum_dtype="int8", **FP32), dtype="bf16"),
    "some rows": Kind(optimizer=chosen("Dion2", aux_lr=1e-3, **FP32)),
    "norms": Kind(optimizer=chosen("MuonH", **FP32)),
    "aux adamw": Kind(optimizer=chosen("Muon", aux="adamw", **FP32)),
    "bf16 weights": Kind(optimizer=chosen("Muon", **FP32), dtype="bf16"),
    "bf16 masters": Kind(
        optimizer=chosen("LionMuon", momentum_dtype="bfloat16", **FP32),
        dtype="bf16",
        config={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        sharded=True,
    ),
    "sub-groups": Kind(optimizer=chosen("Signum"), zero3={"sub_group_size": 300}),
    "round robin": Kind(
        optimizer=chosen("LionMuon", momentum_dtype="int8", **FP32), flat={"round_robin_gradients": True}
    ),
    "no buffer": Kind(optimizer=chosen("SignSGD")),
    "layer scales": Kind(optimizer=chosen("StableLion", layer_scales=[["square", 1.5], ["tall", 0.5]])),
}

Shape = tuple[int, int]
"""Ranks and stage."""


def steps(engine: Any, numbers: Iterable[int], rank: int, world_size: int) -> list[float]:
    """Losses of this rank."""
    losses = []
    for step in numbers:
        tokens, targets = share(*batch(step, BATCH), rank, world_size)
        loss = engine(tokens.to(device()), targets.to(device()))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def layout_of(engine: Any, cell: Cell, world_size: int) -> Layout:
    groups = [[m.spec for m in members] for members in own_optimizer(engine).members]
    size = cell.zero.get("sub_group_size")
    robin = bool(cell.zero.get("round_robin_gradients"))
    return build_layout(groups, stage=cell.stage, world_size=world_size, sub_group_size=size, round_robin=robin)


def held(engine: Any, cell: Cell, rank: int, world_size: int) -> list[tuple[str, str, int, Tensor]]:
    """(parameter, what, first element, values) of all slices on this rank; int8 momentum as numbers."""
    state, tensors = own_optimizer(engine).state, local_tensors(engine)
    views = {m.spec.name: m.view for members in own_optimizer(engine).members for m in members}
    found = []
    position = 0
    for unit in layout_of(engine, cell, world_size).units:
        owned = len(unit.params) if unit.cut == "none" else 1
        own = tensors[position : position + owned]
        position += owned
        for s in unit.slices(rank):
            tensor, name = own[s.tensor], unit.params[s.param].name
            run = slice(s.offset, s.offset + s.numel)
            found.append((name, "master", s.start, tensor.detach().reshape(-1)[run].clone()))
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state[tensor]:
                    found.append((name, key, s.start, state[tensor][key].reshape(-1)[run].clone()))
            for key, rows in state[tensor].items():
                if isinstance(rows, Mapping) and key != "scalars" and len(rows[name]):
                    first, _ = row_range(views[name].columns, s.start, s.numel)
                    found.append((name, key, first, rows[name].clone()))
            if "exp_avg_codes" in state[tensor]:
                first, count = blocks_of(unit, rank)[s.param]
                scales = state[tensor]["exp_avg_scale"][first : first + count]
                codes, values = state[tensor]["exp_avg_codes"].reshape(-1)[run], torch.empty(s.numel)
                rounding = NoiseKey(seed=0, stream=0, step=0, start=s.start)
                Int8(codes=codes, scales=scales, rounding=rounding).load(0, values)
                found.append((name, "exp_avg", s.start, values))
    return found


def gathered(ranks: Iterable[list[tuple[str, str, int, Tensor]]]) -> dict[tuple[str, str], Tensor]:
    """Whole tensors by parameter and what, of the slices of all ranks."""
    slices: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for own in ranks:
        for name, what, first, values in own:
            slices.setdefault((name, what), []).append((first, values))
    whole = {}
    for key, runs in slices.items():
        ordered = dict(sorted(runs, key=lambda run: run[0]))  # the same on every rank where nothing is sharded
        assert list(ordered) == [0, *torch.tensor([len(v) for v in ordered.values()]).cumsum(0).tolist()[:-1]]
        whole[key] = torch.cat(list(ordered.values()))
    return whole


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run: what its ranks hold at some step, its groups, counts and losses from there on, and what they hold then."""

    held: list[tuple[str, str, int, Tensor]]
    groups: list[dict[str, Any]]
    counts: dict[str, Any]
    client: Any
    losses: list[float]
    after: list[tuple[str, str, int, Tensor]]


def look(engine: Any, cell: Cell, rank: int, world_size: int, client: Any = None) -> Seen:
    """What is held now, and after the next steps."""
    optimizer = own_optimizer(engine)
    now = held(engine, cell, rank, world_size)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = [optimizer.state[t] for t in local_tensors(engine)]
    counts = {
        "steps": sorted({s["step"] for s in states}),
        "scalars": {k: v for s in states for k, v in s.get("scalars", {}).items()},
        "keys": sorted({key for s in states for key, value in s.items() if torch.is_tensor(value)}),
        "dtypes": sorted({str(s[k].dtype) for s in states for k in ("exp_avg", "exp_avg_codes") if k in s}),
        "engine": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "schedule": engine.lr_scheduler.state_dict(),
    }
    losses = steps(engine, range(BEFORE, BEFORE + AFTER), rank, world_size)
    return Seen(
        held=now, groups=groups, counts=counts, client=client, losses=losses, after=held(engine, cell, rank, world_size)
    )


def save_runs(rank: int, world_size: int, folder: Path, runs: list[tuple[str, int]]) -> dict[tuple[str, int], Seen]:
    """Train, save and go on, for each kind and stage."""
    found = {}
    for kind, stage in runs:
        cell = KINDS[kind].cell(stage)
        engine = start(cell, world_size, KINDS[kind].optimizer)
        steps(engine, range(BEFORE), rank, world_size)
        engine.save_checkpoint(str(folder / place(kind, (world_size, stage))), client_state={"position": {"epoch": 7}})
        found[kind, stage] = look(engine, cell, rank, world_size, {"epoch": 7})
        engine.destroy()
    return found


def load_runs(
    rank: int, world_size: int, runs: list[tuple[str, int, Path]], *, anew: bool = False, scratch: Path | None = None
) -> list[Seen]:
    """Load by DeepSpeed's own ``load_checkpoint`` into a model with other weights, and go on; ``anew``: by ours."""
    found = []
    for kind, stage, folder in runs:
        cell = KINDS[kind].cell(stage)
        model = TinyNet(seed=9).to(torch.bfloat16 if cell.dtype == "bf16" else torch.float32)
        engine = start(cell, world_size, KINDS[kind].optimizer, model)
        if anew:
            path, client = load_checkpoint(engine, folder, scratch=scratch)
        else:
            path, client = engine.load_checkpoint(str(folder))
        assert path is not None
        found.append(look(engine, cell, rank, world_size, client["position"]))
        engine.destroy()
    return found


def place(kind: str, shape: Shape) -> str:
    return f"{kind} {shape[0]}x{shape[1]}".replace(" ", "-")
