"""The engines that the training-step benchmarks compare: one model, one optimizer each."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from typing import Any

import torch

import ds_optim
from ds_optim.bench.arguments import at_least
from ds_optim.bench.timing import synchronize
from ds_optim.errors import UserError

ADAMW, DEEPSPEED_MUON = "AdamW", "deepspeed:Muon"
CASES: dict[str, dict[str, Any]] = {
    ADAMW: {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": False}},
    DEEPSPEED_MUON: {"type": "deepspeed:Muon", "params": {"lr": 1e-3, "momentum": 0.95}},
    "Lion": {"type": "Lion", "params": {}},
    "Muon": {"type": "Muon", "params": {"lr": 1e-3}},
    "LionMuon": {"type": "LionMuon", "params": {"lr": 1e-3, "period": 2}},
    "SpectralLion": {"type": "SpectralLion", "params": {"basis": "weight"}},
    "SpectralLion-momentum": {"type": "SpectralLion", "params": {"basis": "momentum"}},
}
DEFAULT_CASES = (ADAMW, DEEPSPEED_MUON, "Lion", "Muon", "LionMuon")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen3 model's shape."""

    width: int = 256
    layers: int = 8
    vocabulary: int = 4096

    def check(self) -> None:
        """Raise UserError where there is no such model."""
        at_least("--width", self.width, 8)
        at_least("--layers", self.layers, 1)
        at_least("--vocabulary", self.vocabulary, 2)
        step = 4 if self.width < 128 else 128
        if self.width % step:
            raise UserError(
                f"--width: {self.width} cannot be cut into heads; write a multiple of {step}, "
                f"e.g. {max(step, self.width // step * step)}"
            )

    def __str__(self) -> str:
        return f"Qwen3, {self.width} wide, {self.layers} layers, vocabulary {self.vocabulary}"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a benchmark of engines runs: these of ``CASES``, on so many ranks, at these stages, on such a model."""

    ranks: int
    stages: tuple[int, ...]
    cases: tuple[str, ...]
    shape: ModelShape


def qwen3(shape: ModelShape, seed: int = 0) -> torch.nn.Module:
    """A Qwen3 model with that family's proportions: intermediate 3x, two query heads to a key head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = max(2, shape.width // 64)
    model: torch.nn.Module = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=shape.width,
            intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=shape.width // heads,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    return model


def build(case: str, stage: int, shape: ModelShape, accumulation: int = 1) -> Any:
    """A bf16 engine for one of ``CASES``, without clipping, so that DeepSpeed's Muon and ours do the same work."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "optimizer": CASES[case],
        "zero_optimization": {"stage": stage},
    }
    if case == DEEPSPEED_MUON and stage == 3:
        config["zero_optimization"]["reduce_scatter"] = False  # it refuses to run otherwise
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = ds_optim.initialize(model=qwen3(shape), config=config)
    return engine


SEQUENCE = 1024
"""Tokens of a sequence, where there are more: longer ones would measure attention."""


def random_tokens(engine: Any, vocabulary: int, count: int) -> torch.Tensor:
    """(B, T) of ``count`` tokens in sequences of ``SEQUENCE`` at most, where the engine computes."""
    length = min(count, SEQUENCE)
    tokens = torch.randint(0, vocabulary, (count // length, length), dtype=torch.int64, device="cpu")
    return tokens.to(engine.device)


def train_step(engine: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """One step on ``tokens`` (B, T), in as many micro-batches as the engine accumulates.

    Seconds in all, and in the ``engine.step`` that steps.
    """
    device = tokens.device
    synchronize(device)
    begin = time.perf_counter()
    parts = tokens.chunk(engine.gradient_accumulation_steps())
    for number, part in enumerate(parts, 1):
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        if number < len(parts):
            engine.step()
    synchronize(device)
    middle = time.perf_counter()
    engine.step()
    synchronize(device)
    end = time.perf_counter()
    return end - begin, end - middle
