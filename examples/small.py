"""A model, a tokenizer and data of a second's training, which every example takes in place of yours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIG = str(Path(__file__).with_name("ds.json"))
LR, WEIGHT_DECAY, MICRO_BATCH, STEPS = 1e-2, 0.1, 2, 6
"""As the JSON has them: Trainer wants its arguments to say the same, or "auto" there."""
ON_CPU = not torch.cuda.is_available()


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2")


def data() -> Any:
    """Rows of 16 tokens, each a walk of its own stride."""
    rows = [(torch.arange(16) * (number % 7 + 1) + number) % 61 + 3 for number in range(48)]
    return Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])


def batches() -> Any:
    """The rows in their order, as tensors."""
    return torch.utils.data.DataLoader(data().with_format("torch"), batch_size=MICRO_BATCH)
