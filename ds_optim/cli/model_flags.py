"""Flags of ``estimate`` and ``suggest`` that say what a rank computes, so that each is described once."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL = "A preset, a transformers config.json or folder, a hub name, or a JSON list of parameters."

GpuMemory = Annotated[str | None, typer.Option(help="Size of a GPU, such as 80GiB: says what fits.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="Ranks of a node.")]
SeqLen = Annotated[int, typer.Option(min=1, help="Tokens a sequence.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Activations are computed again in backward.")]
Attention = Annotated[str, typer.Option(help="sdpa, or eager, which keeps its scores.")]
LossChunks = Annotated[
    int, typer.Option(min=1, help="Pieces in which logits and loss are computed; ALST's shards are such.")
]
LigerLoss = Annotated[bool, typer.Option("--liger-loss", help="Liger's fused linear cross-entropy, in its own pieces.")]
Lora = Annotated[int | None, typer.Option(help="Train LoRA of this rank alone, on all linear layers.")]
