"""``ds-optim suggest``: the optimizer to take in AdamW's place under a DeepSpeed JSON, and what it saves there.

What a rank holds decides, and nothing else: which of the candidates trains best is for a run of your own model to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.memory.estimate_fit import USABLE, fits
from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_shards import parallel_of
from ds_optim.memory.estimate_sources import unused_keys, zero_settings
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.side_by_side import BASELINE, EstimateRequest, EstimateRow, estimate_rows
from ds_optim.zero.auto import AUTO, at
from ds_optim.zero.conversion import Converted, convert
from ds_optim.zero.refused import is_true
from ds_optim.zero.support import sequences_cut_in
from ds_optim.zero.values import understood

CANDIDATES: Mapping[str, str] = {
    "LionMuon": "orthogonalizes at every second step and steps by signs between, so that every second step moves no "
    "matrix between ranks",
    "Muonlight": "orthogonalizes at every step, and takes AdamW's learning rate and decay as they are",
    "Lion": "brings no matrices together: nothing travels beside what ZeRO sends, and a step needs least scratch",
}
"""By JSON type what speaks for each, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """The row that was chosen, those of AdamW and of every candidate with that momentum, and the JSON for it.

    lower: rows of AdamW and of the choice at the stages from 1 up to the JSON's.
    """

    chosen: EstimateRow
    rows: tuple[EstimateRow, ...]
    converted: Converted
    lower: tuple[tuple[EstimateRow, EstimateRow], ...]

    @property
    def optimizer(self) -> str:
        return self.chosen.estimate.optimizer.name

    @property
    def momentum_dtype(self) -> str:
        return self.chosen.estimate.optimizer.momentum_dtype

    @property
    def room(self) -> float | None:
        """Bytes that tensors of a rank may take; None where nobody said how large a GPU is."""
        size = self.chosen.request.gpu_bytes
        return None if size is None else size * USABLE

    def fits(self, row: EstimateRow) -> bool:
        return _fits(row)


def suggest(
    config: Mapping[str, Any],
    model: ModelShape,
    *,
    ranks: int,
    gpu_bytes: int | None = None,
    seq_len: int = 1024,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    attention: str = "sdpa",
    loss_chunks: int = 1,
    liger_loss: bool = False,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Suggestion:
    """The first candidate that fits, at the widest momentum at which one does; where none does, the smallest.

    Args:
        config: a DeepSpeed JSON for AdamW, as ``load_config`` reads it.
        gpu_bytes: of an accelerator; without it the first candidate is taken.
        micro_batch: sequences that a rank takes at once, in place of the JSON's.
        seq_len, checkpointing, attention, loss_chunks, liger_loss: as in ``Batch``; of whole sequences.
        lr, weight_decay: AdamW's, where the JSON does not say.

    Raises:
        UserError: the JSON is none that runs, or leaves its stage or rate open.
    """
    flags = EstimateRequest(
        model=model,
        optimizers=(BASELINE, *CANDIDATES),
        ranks=(ranks,),
        gpu_bytes=gpu_bytes,
        seq_len=seq_len,
        checkpointing=checkpointing,
        attention=attention,
        loss_chunks=loss_chunks,
        liger_loss=liger_loss,
    )
    asked = _with_json(flags, understood(dict(config)), micro_batch)
    by_dtype = [estimate_rows(replace(asked, momentum_dtypes=(dtype,))) for dtype in DTYPES]
    rows = next((some for some in by_dtype if any(_fits(row) for row in some[1:])), None)
    if rows is None:
        rows = min(by_dtype, key=lambda some: min(row.peak for row in some[1:]))
        chosen = min(rows[1:], key=lambda row: row.peak)
    else:
        chosen = next(row for row in rows[1:] if _fits(row))
    plan = chosen.estimate.optimizer
    converted = convert(config, plan.name, lr=lr, weight_decay=weight_decay)
    if plan.momentum_dtype != "float32":
        converted.config["optimizer"]["params"]["momentum_dtype"] = plan.momentum_dtype
        why = "it does not fit in more" if _fits(chosen) else "the least that it can hold"
        converted.changes.append(f"optimizer.params.momentum_dtype: {plan.momentum_dtype} ({why})")
    return Suggestion(
        chosen=chosen,
        rows=tuple(rows),
        converted=converted,
        lower=tuple(_lower(asked, plan.name, plan.momentum_dtype)),
    )


def _lower(asked: EstimateRequest, name: str, dtype: str) -> Iterator[tuple[EstimateRow, EstimateRow]]:
    """AdamW and the choice at the stages from 1 up to the one that is asked for."""
    (stage,) = asked.stages
    for below in range(1, stage):
        request = replace(asked, stages=(below,), optimizers=(BASELINE, name), momentum_dtypes=(dtype,))
        adamw, own = estimate_rows(request)
        yield adamw, own


def _fits(row: EstimateRow) -> bool:
    size = row.request.gpu_bytes
    return size is None or fits(row.estimate.largest, size, row.passes)


def _with_json(flags: EstimateRequest, config: Mapping[str, Any], micro_batch: int | None) -> EstimateRequest:
    """What is to be estimated, from the JSON where it speaks."""
    stage = at(config, "zero_optimization.stage") or 0
    if stage == AUTO:
        raise UserError('zero_optimization.stage is "auto" in --from: write 0, 1, 2 or 3')
    accumulation = at(config, "gradient_accumulation_steps")
    given = {"dtype": _dtype(config), **zero_settings(config, flags.model)}
    (ranks,) = flags.ranks
    tensor, experts = parallel_of(config)
    told = at(config, "train_micro_batch_size_per_gpu")
    return replace(
        flags,
        stages=(stage,),
        zero=ZeroSettings(stage=stage, ranks=ranks, accumulation=accumulation if _whole(accumulation) else 2, **given),
        micro_batch=micro_batch or (told if _whole(told) else 1),
        seq_len=max(1, flags.seq_len // (sequences_cut_in(dict(config)) or 1)),
        tensor=tensor,
        experts=experts,
        unused=unused_keys(config),
    )


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _dtype(config: Mapping[str, Any]) -> str:
    """What the weights are in; a switch that is "auto" is taken for bf16."""
    switches = [(name, at(config, f"{section}.enabled")) for section, name in _SWITCHES.items()]
    on = [name for name, value in switches if is_true(value)]
    return on[0] if on else "bf16" if AUTO in (value for _, value in switches) else "fp32"


_SWITCHES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}
"""Sections that switch 16-bit weights on, old names among them."""
