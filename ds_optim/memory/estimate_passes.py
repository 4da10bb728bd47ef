"""The passes of a model that is to be estimated: counted where it runs on shapes, else by a formula over its widths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_terms import TORCH_DTYPES, WEIGHT_BYTES
from ds_optim.memory.estimate_widths import Transformer
from ds_optim.memory.passes import NOTHING, Moment, Passes, extrapolated
from ds_optim.memory.rehearsal import rehearse

_FP32 = 4
FORMULA = (
    "an estimate, as this model does not run on shapes: weights' bytes x micro-batch x sequence x (layers x (4 h + 2 a"
    " d + 2 k d + f i) + h) with f = 4 for a gated MLP, else 2, attention that keeps no s x s scores, and logits of (2"
    " or 4) + 8 bytes each; with checkpointing, layers x h and one layer in full"
)
#: What the formula was below passes that were counted, at most, as a part of itself: 0.68 of the peak, 0.9 with
#: checkpointing.
_SHORT, _SHORT_CHECKPOINTED = 1 / 0.68 - 1, 1 / 0.9 - 1


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
        return by_formula(
            self.model.transformer,
            micro_batch=micro_batch,
            seq_len=batch.seq_len,
            dtype_bytes=WEIGHT_BYTES[batch.dtype],
            checkpointing=batch.checkpointing,
        )


def by_formula(
    shape: Transformer, *, micro_batch: int, seq_len: int, dtype_bytes: int = 2, checkpointing: bool = False
) -> Passes:
    """Roughly, as ``FORMULA`` says, after Korthikanti et al. 2022 (arXiv 2205.05198): layers without dropout.

    Of each layer its input, both normalized inputs and the sum between (4 h), queries and output (2 a d), keys and
    values (2 k d), and the MLP's inner tensors. Norms that compute in fp32 and what is not fused make it short.
    """
    attention = 2 * shape.heads * shape.head_dim + 2 * shape.key_value_heads * shape.head_dim
    layer = 4 * shape.hidden + attention + (4 if shape.gated else 2) * shape.intermediate
    layers = shape.layers * shape.hidden + layer if checkpointing else shape.layers * layer
    tokens = micro_batch * seq_len
    logits = tokens * shape.vocabulary * (dtype_bytes + 2 * _FP32)
    held = tokens * (layers + shape.hidden) * dtype_bytes + logits
    short = int(held * (_SHORT_CHECKPOINTED if checkpointing else _SHORT))
    return Passes(kept=held, moments=(Moment(held=held, logits=logits, made=0),), short=short, how=FORMULA)
