"""One training step under the user's own DeepSpeed JSON, to see which optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_SEQ_LEN = 16
_STEPS = 2


def trial(config: Path | None) -> dict[str, Any]:
    """Train qwen3-tiny for two steps as ``config`` says; collective.

    Returns ``optimizers``: the classes whose ``step`` ran, and ``loss``: of each step. Raises UserError, on every
    rank, for what the JSON must not have.
    """
    from ds_optim.train.deepspeed_json import read_json, settings_from_json
    from ds_optim.train.loop import train
    from ds_optim.train.settings import make_settings

    given: dict[str, Any] = {"steps": _STEPS, "warmup": 0, "seq_len": _SEQ_LEN, "eval_batches": 1}
    if config is not None:
        given = settings_from_json(read_json(config), given)
    else:
        given |= {"stage": 2, "dtype": "fp32"}
    stepped: dict[str, None] = {}

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kind = type(optimizer)
        stepped[f"{kind.__module__}.{kind.__qualname__}"] = None

    hook = register_optimizer_step_post_hook(note)
    try:
        result = train(make_settings(**given))
    finally:
        hook.remove()
    return {"optimizers": list(stepped), "loss": result.losses, "skipped": result.skipped_steps}
