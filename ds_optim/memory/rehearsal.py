"""A forward and a backward pass without a byte of data: the model is run on shapes, and what it would hold is counted.

A copy of the model on the meta device goes through ``next_token_losses`` and backward as a run would take it, and each
storage is counted as long as it lives. So any architecture is counted as it is written, experts, latent attention and
checkpointing among them, in the seconds that Python takes to walk through it. What meta tensors cannot show is said
here: which kernel attention takes, and what is asked of values (no sequence is padded). An operator's own workspace is
not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ds_optim.memory.losses import fused_loss, losses
from ds_optim.memory.passes import Moment, Passes
from ds_optim.memory.tracker import TensorTracker

COUNTED = "counted by running the model on shapes"


def rehearse(
    module: nn.Module,
    *,
    micro_batch: int,
    seq_len: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    attention: str = "sdpa",
    loss_chunks: int = 1,
    liger_loss: bool = False,
    device: str = "cuda",
) -> Passes:
    """Count the passes of a language model of ``transformers``.

    Args:
        module: on the meta device; it stays as it is. Frozen parameters have no gradient, as in a run.
        seq_len: tokens that a rank computes of each sequence.
        dtype: what the weights and the passes are in.
        checkpointing: the model's own gradient checkpointing, a layer at a time.
        attention: transformers' name of the implementation; "eager" where the class has no other.
        loss_chunks: pieces of the tokens whose logits are made one after another, and again in backward.
        liger_loss: in their place Liger's fused linear cross-entropy, in pieces of its own.
        device: whose kernels attention and dropout take, "cuda" or "cpu".

    Raises:
        Exception: of any type, where the model does what no meta tensor can.
    """
    model = _prepared(module, dtype, checkpointing, attention)
    windows = torch.zeros(micro_batch, seq_len + 1, dtype=torch.int64, device="meta")
    moments: list[Moment] = []
    made = 0
    counter = _Counter(model, windows)
    with counter, _OnDevice(device):

        def complete(parameter: Tensor) -> None:
            nonlocal made
            moments.append(counter.moment(made))
            made += parameter.numel()
            parameter.grad = None  # what becomes of it is ZeRO's business
            counter.reset()

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(complete)
        loss = fused_loss(model, windows, device) if liger_loss else losses(model, windows, loss_chunks).mean()
        kept = counter.live_bytes - counter.base_bytes
        moments.append(counter.moment(made))
        counter.reset()
        # By its edge: of a tensor, the modes would be left for what checkpointing computes again.
        torch.autograd.backward(get_gradient_edge(loss))
        moments.append(counter.moment(made))
    return Passes(kept=kept, moments=tuple(moments), how=COUNTED)


def _prepared(module: nn.Module, dtype: torch.dtype, checkpointing: bool, attention: str) -> Any:
    from transformers.utils import logging

    model: Any = copy.deepcopy(module).to(dtype)
    model.train()
    model.config.use_cache = False
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a class that has one kind of attention alone says so at length
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        model.set_attn_implementation("eager")
    finally:
        logging.set_verbosity(level)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _vocabulary(model: Any) -> int:
    try:
        return int(model.config.get_text_config().vocab_size)
    except (AttributeError, ValueError):
        return 0


class _Counter(TensorTracker):
    """Counts meta tensors, and apart those that are as wide as the vocabulary."""

    def __init__(self, model: Any, *inputs: Tensor) -> None:
        super().__init__("meta")
        self._there = [*model.parameters(), *model.buffers(), *inputs]
        self._vocabulary = _vocabulary(model)
        self._logits: dict[int, int] = {}
        self._logits_at_peak = 0

    def moment(self, made: int) -> Moment:
        """The most since the last ``reset``."""
        return Moment(held=self.peak_bytes - self.base_bytes, logits=self._logits_at_peak, made=made)

    def reset(self) -> None:
        self.peak_bytes = self.live_bytes
        self._logits_at_peak = sum(self._logits.values())

    def _alive(self) -> Iterable[Tensor]:
        """Those alone: what else there is of meta tensors may be garbage, and go meanwhile."""
        return self._there

    def _add(self, tensors: Iterable[Tensor]) -> None:
        tensors, before = list(tensors), self.peak_bytes
        new = {tensor.untyped_storage()._cdata: tensor for tensor in tensors if self._wide(tensor)}
        new = {key: tensor for key, tensor in new.items() if key not in self._watched}
        super()._add(tensors)
        self._logits |= {key: tensor.untyped_storage().nbytes() for key, tensor in new.items() if key in self._watched}
        if self.peak_bytes > before:
            self._logits_at_peak = sum(self._logits.values())

    def _forget(self, key: int, size: int, reference: object) -> None:
        super()._forget(key, size, reference)
        self._logits.pop(key, None)

    def _wide(self, tensor: Tensor) -> bool:
        return tensor.device.type == "meta" and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary


class _OnDevice(TorchFunctionMode):
    """Has attention and dropout take the kernels of ``device``, and answers what is asked of values.

    Conditions hold, as those do by which masks of whole sequences are left out; no token is one of those searched for.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].device.type == "meta"):
            return func(*args, **kwargs)
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.dropout and self._device != "cpu":
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Fused kernels keep their inputs, their output and a number a row; on a CPU there are none for dropout or for
        values of another width, where torch multiplies matrices."""
        dropout = kwargs.get("dropout_p", args[1] if len(args) > 1 else 0.0)
        if self._device == "cpu" and (dropout or value.shape[-1] != query.shape[-1]):
            attended: Tensor = functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
            return attended
        fused: Tensor = _Fused.apply(query, key, value)
        return fused


_ANSWERS = {Tensor.__bool__: True, Tensor.__contains__: False}


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Where the kernel keeps a byte an element of what it dropped, not a mask in the values' dtype."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


class _Fused(torch.autograd.Function):
    """A fused attention kernel's shapes: (b, heads, s, d) in; the output lies in memory as (b, s, heads, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, heads, s, _ = query.shape
        out = query.new_empty(b, s, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(b, heads, s, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = ctx.saved_tensors[:3]
        return tuple(tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in inputs)
