"""Two training steps under the user's own DeepSpeed JSON, as ``ds_optim.initialize`` reads it: what will run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ds_optim.job import models
from ds_optim.machine import ranks
from ds_optim.zero.reading import load_config

_SEQ_LEN = 16
_STEPS = 2
_VOCABULARY = 257
_SEQUENCES = 8
"""At most so many of a micro-batch: more of them would show no more."""
_DEFAULT = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
_OPTIMIZER = {"type": "LionMuon", "params": {}}
_WIDTH = 32

Losses = Callable[[Any, torch.Tensor], torch.Tensor]
"""(engine, windows (batch, seq_len + 1)) -> the loss of each target."""


def trial(config: Path | None) -> dict[str, Any]:
    """Train qwen3-tiny, or without transformers a smaller model, for two steps as ``config`` says; collective.

    Only the model and the text are the trial's own; and LionMuon, where the JSON names no optimizer.

    Returns ``optimizers``: the classes whose ``step`` ran, and ``loss``: of each step. Raises UserError, on every
    rank, for what the JSON must not have.
    """
    import ds_optim

    # What one rank cannot read is raised by all of them, in their first word to each other.
    loaded = ranks.together(lambda: load_config(_DEFAULT if config is None else config))
    loaded.setdefault("optimizer", _OPTIMIZER)
    model, losses_of = _model()
    stepped: dict[str, None] = {}

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kind = type(optimizer)
        stepped[f"{kind.__module__}.{kind.__qualname__}"] = None

    hook = register_optimizer_step_post_hook(note)
    try:
        engine, *_ = ds_optim.initialize(model=model, config=loaded)
        losses = [_step(engine, losses_of, index) for index in range(_STEPS)]
        engine.destroy()
    finally:
        hook.remove()
    return {"optimizers": list(stepped), "loss": losses}


def _model() -> tuple[nn.Module, Losses]:
    if find_spec("transformers") is not None:
        shape = models.preset_config("qwen3-tiny", _VOCABULARY, _SEQ_LEN)
        return models.build_model(shape, seed=0), models.next_token_losses
    torch.manual_seed(0)
    body = (nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.LayerNorm(_WIDTH))
    return nn.Sequential(nn.Embedding(_VOCABULARY, _WIDTH), *body, nn.Linear(_WIDTH, _VOCABULARY)), _plain_losses


def _plain_losses(engine: Any, windows: torch.Tensor) -> torch.Tensor:
    logits = engine(windows[:, :-1]).flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none")


def _step(engine: Any, losses_of: Losses, index: int) -> float:
    """One update; the mean loss of its micro-batches over all ranks."""
    draw = torch.Generator().manual_seed(1 + index * ranks.world_size() + ranks.rank())
    shape = (min(engine.train_micro_batch_size_per_gpu(), _SEQUENCES), _SEQ_LEN + 1)
    total = 0.0
    for _ in range(engine.gradient_accumulation_steps()):
        windows = torch.randint(0, _VOCABULARY, shape, generator=draw, dtype=torch.int64, device="cpu")
        windows = windows.to(ranks.device())
        loss = losses_of(engine, windows).mean()
        engine.backward(loss)
        engine.step()
        total += float(loss.detach())
    (summed,) = ranks.sums([total])
    return summed / (engine.gradient_accumulation_steps() * ranks.world_size())
