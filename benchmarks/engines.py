"""The engines that the training-step benchmarks compare: one model, one optimizer each."""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import torch

import ds_optim

CASES: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": False}},
    "deepspeed:Muon": {"type": "deepspeed:Muon", "params": {"lr": 1e-3, "momentum": 0.95}},
    "Lion": {"type": "Lion", "params": {}},
    "Muon": {"type": "Muon", "params": {"lr": 1e-3}},
    "LionMuon": {"type": "LionMuon", "params": {"lr": 1e-3, "period": 2}},
    "SpectralLion": {"type": "SpectralLion", "params": {"basis": "weight"}},
    "SpectralLion-momentum": {"type": "SpectralLion", "params": {"basis": "momentum"}},
}
DEFAULT_CASES = ("AdamW", "deepspeed:Muon", "Lion", "Muon", "LionMuon")


def qwen3(width: int, layers: int, vocabulary: int, seed: int = 0) -> torch.nn.Module:
    """A Qwen3 model with that family's proportions: intermediate 3x, two query heads to a key head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = max(2, width // 64)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=width // heads,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def build(case: str, stage: int, width: int, layers: int, vocabulary: int) -> Any:
    """A bf16 engine for one of ``CASES``, without clipping, so that DeepSpeed's Muon and ours do the same work."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "optimizer": CASES[case],
        "zero_optimization": {"stage": stage},
    }
    if case == "deepspeed:Muon" and stage == 3:
        config["zero_optimization"]["reduce_scatter"] = False  # it refuses to run otherwise
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = ds_optim.initialize(model=qwen3(width, layers, vocabulary), config=config)
    return engine


def train_step(engine: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """One step on ``tokens`` (1, T): (seconds in all, seconds in ``engine.step``)."""
    begin = time.perf_counter()
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    middle = time.perf_counter()
    engine.step()
    end = time.perf_counter()
    return end - begin, end - middle
