"""Named models and what trains them well: shapes, data shapes and learning rates, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by its shape, with the data shapes that suit it.

    ``vocab_size`` None means "as large as the tokenizer's"; a number is kept even where the tokenizer has
    fewer tokens.
    """

    vocab_size: int | None
    tokenizer: str
    seq_len: int
    micro_batch: int
    shape: MappingProxyType[str, Any]


PRESETS: dict[str, Preset] = {
    "qwen3-tiny": Preset(
        vocab_size=None,
        tokenizer="bytes",
        seq_len=128,
        micro_batch=8,
        shape=MappingProxyType(
            {
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "intermediate_size": 512,
            }
        ),
    ),
    "qwen3-134m": Preset(
        vocab_size=32_000,
        tokenizer="bpe:32000",
        seq_len=1024,
        micro_batch=8,
        shape=MappingProxyType(
            {
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_key_value_heads": 12,
                "head_dim": 64,
                "intermediate_size": 2048,
            }
        ),
    ),
}

# What a model given by its own config is fed where the command does not say.
MODEL_DEFAULTS = {"tokenizer": "bytes", "seq_len": 512, "micro_batch": 4}

# Of optimizers that are not this package's. For short runs of qwen3-tiny: the best of two to five settings each at 150
# steps of 1,024 bytes in fp32, as the tuned arguments of registered ones are too. Longer runs and larger models want
# lower rates: tune them there.
_TINY_PARAMS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "deepspeed:muon": {"lr": 2e-2, "weight_decay": 0.1},
}


def tuned_params(preset: str | None, optimizer: str) -> dict[str, Any]:
    """The tuned parameters of a preset, or nothing: then the optimizer's own defaults hold."""
    from ds_optim.optimizers.registry import DESCRIBED, canonical_type, plain_name

    described = DESCRIBED.get(canonical_type(optimizer))
    if described is not None:
        return dict(described.tuned.get(preset, {})) if preset is not None else {}
    return dict(_TINY_PARAMS.get(plain_name(optimizer), {})) if preset == "qwen3-tiny" else {}
