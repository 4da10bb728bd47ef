"""The passes of a model that is to be estimated: counted where it runs on shapes, else by a formula over its widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_terms import TORCH_DTYPES, WEIGHT_BYTES
from ds_optim.memory.estimate_widths import Transformer
from ds_optim.memory.losses import liger_piece
from ds_optim.memory.passes import NOTHING, Moment, Passes, extrapolated
from ds_optim.memory.rehearsal import rehearse

_FP32 = 4
FORMULA = (
    "an estimate, as this model does not run on shapes: weights' bytes x micro-batch x sequence x (layers x (4 h + 2 a"
    " d + 2 k d + f i) + h) with f = 4 for a gated MLP, else 2, the s x s scores of attention that is not fused, and "
    "logits of (2 or 4) + 8 bytes each; with checkpointing, layers x h and one layer in full"
)
_SHORT, _SHORT_CHECKPOINTED = 0.3, 0.2
"""Parts of itself by which the formula may be below passes that are counted. At most it was by 0.27, with checkpointing
by 0.16: 365 cells of 29 decoders of two layers (tests/unit/zoo.py), at 1 x 128 and 1 x 1024 tokens, six of them at 4 x
1024 or 4 x 2048 too."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a rank computes at once.

    seq_len: of each sequence what is the rank's own, where ranks share it. checkpointing: a layer at a time, by the
    model's own ``gradient_checkpointing_enable``. attention: as transformers calls it. loss_chunks: pieces in which
    logits and loss are computed. liger_loss: by Liger's fused linear cross-entropy instead. device: "cuda" or "cpu".
    """

    micro_batch: int = 1
    seq_len: int = 1024
    dtype: str = "bf16"
    checkpointing: bool = False
    attention: str = "sdpa"
    loss_chunks: int = 1
    liger_loss: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class ModelPasses:
    """The passes of a model at a batch; ``at`` any number of its sequences."""

    model: ModelShape
    batch: Batch

    @cached_property
    def own(self) -> Passes:
        """Of the batch itself; no moments where neither a class nor widths are known."""
        return self._counted(self.batch.micro_batch)

    def at(self, micro_batch: int) -> Passes:
        """Of so many sequences."""
        if micro_batch == self.batch.micro_batch:
            return self.own
        return self._one if micro_batch == 1 else extrapolated(*self._two_and_three, micro_batch)

    @cached_property
    def _one(self) -> Passes:
        return self._counted(1)

    @cached_property
    def _two_and_three(self) -> tuple[Passes, Passes]:
        return self._counted(2), self._counted(3)

    def _counted(self, micro_batch: int) -> Passes:
        batch, module = self.batch, self.model.module
        if module is not None and hasattr(module, "config"):
            try:
                return rehearse(
                    module,
                    micro_batch=micro_batch,
                    seq_len=batch.seq_len,
                    dtype=TORCH_DTYPES[batch.dtype],
                    checkpointing=batch.checkpointing,
                    attention=batch.attention,
                    loss_chunks=batch.loss_chunks,
                    liger_loss=batch.liger_loss,
                    device=batch.device,
                )
            except Exception:  # models raise what they like where there are no values
                pass
        if self.model.transformer is None:
            return NOTHING
        trained = self.model.trainable
        return by_formula(
            self.model.transformer,
            replace(batch, micro_batch=micro_batch),
            largest=max((parameter.numel for parameter in trained), default=0),
            elements=sum(parameter.numel for parameter in trained),
        )


def by_formula(shape: Transformer, batch: Batch, *, largest: int = 0, elements: int = 0) -> Passes:
    """Roughly, as ``FORMULA`` says, after Korthikanti et al. 2022 (arXiv 2205.05198): layers without dropout.

    Of each layer its input, both normalized inputs and the sum between (4 h), queries and output (2 a d), keys and
    values (2 k d), and the MLP's inner tensors. Norms that compute in fp32 and what is not fused make it short.

    Args:
        largest: elements of the largest gradient, which is made before it is complete; of a tied head three such meet
            at the end. elements: of all gradients.
    """
    itemsize, tokens = WEIGHT_BYTES[batch.dtype], batch.micro_batch * batch.seq_len
    attention = 2 * shape.heads * shape.head_dim + 2 * shape.key_value_heads * shape.head_dim
    layer = 4 * shape.hidden + attention + (4 if shape.gated else 2) * shape.intermediate
    whole = tokens * (layer * itemsize + _scores(shape, batch))
    layers = tokens * shape.layers * shape.hidden * itemsize + whole if batch.checkpointing else shape.layers * whole
    logits, kept_gradient = _loss(shape, batch)
    held = layers + tokens * shape.hidden * itemsize + logits + kept_gradient
    making = largest * itemsize
    first = Moment(held=held + making, logits=logits, made=0)
    last = Moment(held=making * (3 if shape.tied else 1), made=elements)
    short = int(max(first.held, last.held) * (_SHORT_CHECKPOINTED if batch.checkpointing else _SHORT))
    return Passes(kept=held, moments=(first, last), short=short, how=FORMULA)


def _scores(shape: Transformer, batch: Batch) -> int:
    """Bytes a token that a layer keeps of attention's scores: as fp32 and in the weights' dtype, dropped ones too."""
    if shape.fused and batch.attention != "eager" and not (shape.dropout and batch.device == "cpu"):
        return 0
    itemsize = WEIGHT_BYTES[batch.dtype]
    return batch.seq_len * shape.heads * (itemsize + _FP32 + shape.dropout * (itemsize + 1))


def _loss(shape: Transformer, batch: Batch) -> tuple[int, int]:
    """Bytes of logits at once, and of the head's gradient where the loss makes it."""
    itemsize, tokens = WEIGHT_BYTES[batch.dtype], batch.micro_batch * batch.seq_len
    if not batch.liger_loss or not shape.vocabulary:
        return -(-tokens // batch.loss_chunks) * shape.vocabulary * (itemsize + 2 * _FP32), 0
    piece = liger_piece(tokens, shape.hidden, shape.vocabulary)
    return piece * shape.vocabulary * itemsize, shape.vocabulary * shape.hidden * itemsize
