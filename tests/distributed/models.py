"""A small model with every kind of parameter that the matrix of tests needs, and its batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 37
WIDTH = 24
LENGTH = 5
"""Tokens of one sequence."""


class TinyNet(nn.Module):
    """Next-token model over 37 words whose names, in order, are

    embed.weight (37, 24) odd vocabulary; tall.weight (48, 24), tall.bias (48,); wide.weight (24, 72);
    norm.weight, norm.bias (24,); fused.weight (72, 24), query, key and value in one;
    square.weight (24, 24); row.weight (1, 24); lm_head.weight (37, 24), the same tensor as
    embed.weight if `tied`.

    Every parameter has a gradient above rounding at every batch, `square` excepted where a call
    skips it. (So no bias under `fused`: a softmax does not feel the key's.)
    """

    def __init__(self, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.tall = nn.Linear(WIDTH, 2 * WIDTH)
        self.wide = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.row = nn.Linear(WIDTH, 1, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """The same weights for the same seed, on any rank, no two of them alike."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            offset = 1.0 if name == "norm.weight" else 0.0
            with torch.no_grad():
                parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: Tensor, targets: Tensor, unused: bool = False) -> Tensor:
        """Mean cross-entropy. tokens, targets: (B, T) int64; unused: leave `square` out."""
        x = self.embed(tokens)
        x = x + self.wide(torch.cat([torch.tanh(self.tall(x)), x], dim=-1))
        query, key, value = self.fused(self.norm(x)).chunk(3, dim=-1)
        mixed = torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5, dim=-1) @ value
        x = x + (mixed if unused else self.square(mixed))
        x = x * torch.sigmoid(self.row(x))
        # 16-bit logits would round the loss that runs are compared by
        logits = self.lm_head(x).to(torch.promote_types(x.dtype, torch.float32))
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


def batch(step: int, size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step: two (size, LENGTH) int64 tensors, the same on every rank.

    A rank takes its share with `share`; every word occurs in every batch of 8 sequences or more, so
    that no row of the embedding goes without a gradient.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    count = size * LENGTH
    words = torch.randperm(count, generator=generator) % VOCABULARY
    targets = torch.randperm(count, generator=generator) % VOCABULARY
    return words.view(size, LENGTH), targets.view(size, LENGTH)


def share(
    tokens: Tensor, targets: Tensor, rank: int, world_size: int, micro: int = 0, accumulation: int = 1
) -> tuple[Tensor, Tensor]:
    """The part of a global batch that a rank sees in micro-step `micro` of `accumulation`.

    Parts are equal, so the mean over ranks and micro-steps of their mean losses is the batch's.
    """
    parts = world_size * accumulation
    if tokens.shape[0] % parts:
        raise ValueError(f"{tokens.shape[0]} sequences do not divide into {parts} equal parts")
    chosen = slice(micro * world_size + rank, None, parts)
    return tokens[chosen], targets[chosen]
