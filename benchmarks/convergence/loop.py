"""One cell: a whole run without an engine. Stages give the same weights (``tests/distributed/test_parity.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.convergence.study import Cell, Model, Study
from benchmarks.convergence.text import Text
from ds_optim.data.batches import BatchShape, PackedBatches, windows_at
from ds_optim.job.models import build_model, next_token_losses, preset_config
from ds_optim.train.evaluate import evaluation_windows
from ds_optim.train.schedule import WarmupCosine
from ds_optim.zero.config import build_optimizer, is_ours

SAVE_S = 120.0
"""Seconds between a cell's checkpoints."""

Losses = Callable[[Any, torch.Tensor], torch.Tensor]


@cache
def compiled_losses() -> Losses:
    """``next_token_losses`` compiled once a process: a model of the same shape takes the same code."""
    return torch.compile(next_token_losses, dynamic=False)


def run_cell(
    study: Study, cell: Cell, text: Text, device: torch.device, checkpoint: Path | None = None, compiled: bool = False
) -> dict[str, Any]:
    """Train a cell to its end; what it measured. ``compiled``: forward and backward by torch.compile, a quarter less
    time on a CPU and other roundings.

    A run that was killed goes on from ``checkpoint``, with the losses that it would have had; a run whose loss is no
    number ends there, with ``val_loss`` None.
    """
    shape = study.models[cell.model]
    model = build_model(model_config(shape, text.vocab_size), cell.seed).to(device)
    optimizer = make_optimizer(model, cell)
    steps = study.steps(cell)
    schedule = WarmupCosine(optimizer, int(steps * study.warmup), steps)
    batch = BatchShape(seq_len=shape.seq_len, micro_batch=shape.batch, accumulation=1, rank=0, world_size=1)
    batches = PackedBatches(text.train, batch, cell.seed)
    losses = compiled_losses() if compiled else next_token_losses
    every = max(1, steps // study.evals)
    state: dict[str, Any] = {"step": 0, "curve": [], "seconds": 0.0, "clipped": 0, "window": []}
    if checkpoint is not None and checkpoint.exists():
        state = _restore(checkpoint, model, optimizer)
    began = saved = time.perf_counter()
    before = state["seconds"]
    for step in range(state["step"], steps):
        schedule.set(step)
        (windows,) = batches.step(step)
        loss = losses(model, windows.to(device)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), study.clip) if study.clip else torch.zeros(())
        # (DeepSpeed decorates functions of its Muon with torch.compile: they run as written)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["window"].append(float(loss.detach()))
        state["clipped"] += int(float(norm) > study.clip)
        state["step"], state["seconds"] = step + 1, before + time.perf_counter() - began
        if not np.isfinite(state["window"][-1]):
            return _result(cell, state, steps, batch, text, None)
        if (step + 1) % every == 0 or step + 1 == steps:
            held = validate(model, text, shape, study.eval_batches, losses)
            state["curve"].append([(step + 1) * batch.tokens, mean(state["window"]), held, round(state["seconds"], 2)])
            state["window"] = []
        if checkpoint is not None and time.perf_counter() - saved > SAVE_S:
            _save(checkpoint, model, optimizer, state)
            saved = time.perf_counter()
    return _result(cell, state, steps, batch, text, state["curve"][-1][2])


def model_config(shape: Model, vocab_size: int) -> Any:
    """The model of a study: a preset, or a Qwen3 of its own shape."""
    if shape.preset is not None:
        return preset_config(shape.preset, vocab_size, shape.seq_len)
    from transformers import Qwen3Config

    return Qwen3Config(
        **shape.shape, vocab_size=vocab_size, max_position_embeddings=max(shape.seq_len, 1024),
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip


def make_optimizer(model: torch.nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """Ours as its JSON would make it; torch's AdamW with decay on matrices alone; DeepSpeed's Muon.

    DeepSpeed's Muon is its class for one device, with the matrices that ours would take and its AdamW for the rest: as
    under ZeRO, but that there the orthogonalized update is clipped again. Its functions run as written, uncompiled.
    """
    params = dict(cell.params)
    if is_ours(cell.optimizer):
        section = {"type": cell.optimizer, "params": {"seed": cell.seed, **params}}
        return build_optimizer(model, cell.optimizer, {"optimizer": section})
    decay = params.pop("weight_decay", 0.1)
    if cell.optimizer == "AdamW":
        wide = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": wide, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        params["betas"] = tuple(params.get("betas", (0.9, 0.95)))
        return torch.optim.AdamW(groups, foreach=True, **params)
    from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuonWithAuxAdam

    aux_lr = params.pop("aux_lr", 3e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    excluded = ("embed", "lm_head")
    matrices = [p for p in model.parameters() if p.ndim == 2 and not any(word in names[id(p)] for word in excluded)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return SingleDeviceMuonWithAuxAdam(
        [
            {"params": matrices, "use_muon": True, "weight_decay": decay, **params},
            {"params": [p for p in rest if p.ndim > 1], "use_muon": False, "lr": aux_lr, "weight_decay": decay},
            {"params": [p for p in rest if p.ndim < 2], "use_muon": False, "lr": aux_lr, "weight_decay": 0.0},
        ]
    )


@torch.no_grad()
def validate(model: Any, text: Text, shape: Model, batches: int, losses: Losses = next_token_losses) -> float:
    """Mean loss in nats a token over evenly spread windows, the same for every cell."""
    model.eval()
    chosen = evaluation_windows(text.validation, shape.seq_len, batches * shape.batch)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, chosen.size, shape.batch):
        windows = windows_at(text.validation, shape.seq_len, chosen[start : start + shape.batch])
        total += float(losses(model, torch.from_numpy(windows.astype(np.int64)).to(device)).double().sum())
    model.train()
    return total / (chosen.size * shape.seq_len)


def _save(path: Path, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, partial)
    partial.replace(path)


def _restore(path: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    saved = torch.load(path, weights_only=False)  # written by this module, in the run's own folder
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state: dict[str, Any] = saved["state"]
    return state


def _result(
    cell: Cell, state: dict[str, Any], steps: int, batch: BatchShape, text: Text, loss: float | None
) -> dict[str, Any]:
    return {
        "key": cell.key,
        "cell": cell.model_dump(),
        "steps": steps,
        "tokens": state["step"] * batch.tokens,
        "val_loss": loss,
        "curve": state["curve"],
        "seconds": round(state["seconds"], 2),
        "clipped": state["clipped"] / max(1, state["step"]),
        "text": text.digest,
    }
