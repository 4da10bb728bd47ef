"""Runs of what ``ds-optim train --config`` calls, several in one set of ranks: a small model's losses, or the line that
refused it."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.job.deepspeed_json import settings_from_json
from ds_optim.job.settings import make_settings
from ds_optim.train.loop import train
from ds_optim.train.meters import grad_norm

from .small_runs import quiet
from .zeropp import forget_groups, stand_in

STEPS, BATCH, LENGTH = 4, 12, 16
"""Updates, sequences of all ranks together in each, and tokens of a sequence."""
OPTIMIZER = {"type": "LionMuon", "params": {"lr": 0.03, "period": 2, "polar": {"steps": 3, "dtype": "float32"}}}
_SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Widths that quantized weights divide into groups of 8 on two ranks.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {
        **_SIZES,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 48,
        "head_dim": 16,
        "num_key_value_heads": 2,
    },
    "deepseek": {
        **_SIZES,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
_BUCKETS = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000}


@dataclass(frozen=True, kw_only=True)
class Command:
    """``--config`` and flags; stage: of ZeRO, which the config leaves out."""

    stage: int
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=lambda: OPTIMIZER)


@dataclass(frozen=True)
class Trained:
    """Of every step the loss, and the norm of the gradient before clipping where the stage keeps one.

    Signs and polar factors hardly feel a gradient that is twice too large; its norm does.
    """

    losses: list[float]
    norms: list[float | None]


class _Norms:
    """An observer of a run, of the norms alone."""

    def __init__(self) -> None:
        self.found: list[float | None] = []

    def on_start(self, engine: Any) -> None: ...
    def on_moment(self, engine: Any, moment: str) -> None: ...
    def on_end(self, engine: Any) -> None: ...

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        self.found.append(grad_norm(engine))


def write_inputs(folder: Path) -> None:
    """The models and a text of a few words, which is learnt within steps."""
    for name, model in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(model), encoding="utf-8")
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefgh", k=drawn.randint(2, 5))) for _ in range(12)]
    (folder / "text.txt").write_text(" ".join(drawn.choices(words, k=4000)), encoding="utf-8")


def answers(rank: int, world_size: int, folder: Path, commands: Sequence[Command]) -> list[Trained | str]:
    """What every command of these came to in this rank, one after another; in a folder of ``write_inputs``."""
    os.chdir(folder)
    quiet()
    gc.freeze()  # what the parent imported is no garbage, which ZeRO-3 looks for
    stand_in()
    return [_answer(command) for command in commands]


def _answer(command: Command) -> Trained | str:
    """Any error but a line to the user stands with its type: one run does not hide the others."""
    forget_groups()
    config = {"gradient_clipping": 0.0, "train_batch_size": BATCH, "optimizer": command.optimizer, **command.config}
    config["zero_optimization"] = {"stage": command.stage, **_BUCKETS, **config.get("zero_optimization", {})}
    flags = {"model": "qwen3", "data": "text.txt", "seq_len": LENGTH, "steps": STEPS, "warmup": 0, "eval_batches": 1}
    norms = _Norms()
    try:
        losses = train(make_settings(**settings_from_json(config, {**flags, **command.flags})), norms).losses
    except UserError as refusal:
        return str(refusal)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return Trained(losses, norms.found)
