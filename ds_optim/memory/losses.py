"""The loss of a language model as a rehearsal computes it: whole, in pieces, or as Liger's fused one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def losses(model: Any, windows: Tensor, chunks: int = 1) -> Tensor:
    """Of each token, as a run takes them.

    Args:
        windows: tokens, (micro_batch, seq_len + 1).
        chunks: pieces of the tokens whose logits are made one after another, and again in backward. DeepSpeed's
            ``TiledFusedLogitsLoss`` holds as much at once with as many shards.
    """
    from ds_optim.job.models import next_token_losses  # brings what an estimate of numbers alone does without

    if chunks == 1:
        return next_token_losses(model, windows)
    hidden, head = _before_logits(model, windows)

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(head(states).float(), targets, reduction="none")

    pairs = zip(hidden.chunk(chunks), windows[:, 1:].reshape(-1).chunk(chunks), strict=True)
    return torch.cat([checkpoint(of_chunk, *pair, use_reentrant=False) for pair in pairs])


def fused_loss(model: Any, windows: Tensor, device: str) -> Tensor:
    """What Liger's fused linear cross-entropy holds, without its values; a head's bias is left out.

    Args:
        device: "cuda" or "cpu", where Liger adds up the head's gradient by way of an fp32 copy.
    """
    hidden, head = _before_logits(model, windows)
    loss: Tensor = _Liger.apply(hidden, head.weight, device == "cpu")
    return loss


def _before_logits(model: Any, windows: Tensor) -> tuple[Tensor, Any]:
    """The last hidden states, (tokens, h), and the layer that makes logits of them."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = whole.base_model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1), whole.get_output_embeddings()


def liger_piece(tokens: int, hidden: int, vocabulary: int) -> int:
    """Tokens whose logits liger-kernel 0.8.5 makes at once: so many that these take about what all hidden states do."""
    share = -(-tokens // -(-vocabulary // hidden))
    return min(tokens, 1 << (share - 1).bit_length())


class _Liger(torch.autograd.Function):
    """Of hidden states (n, h) and weights (V, h): both gradients are made in forward, and kept until backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, by_copy: bool) -> Tensor:
        of_states = torch.zeros_like(states)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        size = liger_piece(len(states), weight.shape[1], weight.shape[0])
        for piece, gradient in zip(states.split(size), of_states.split(size), strict=True):
            logits = piece @ weight.t()  # their gradient takes their place
            gradient.copy_(logits @ weight)
            if of_weight is not None and by_copy:
                of_weight += torch.mm(logits.t(), piece).float()
            del logits
        ctx.save_for_backward(of_states, of_weight)
        return states.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*ctx.saved_tensors, None)
