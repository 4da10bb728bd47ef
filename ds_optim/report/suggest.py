"""What ``ds-optim suggest`` says: the choice, what it saves, and why, each in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from ds_optim.memory.estimate_fit import RANKS, USABLE
from ds_optim.memory.side_by_side import EstimateRow
from ds_optim.memory.suggest import CANDIDATES, Suggestion
from ds_optim.report.estimate import unused
from ds_optim.report.units import fixed, size

_ANY_MODEL = (
    "Which of them trains your model best nobody knows before it is tried at your length: docs/evidence.md has what "
    "small runs showed, docs/optimizers.md the other optimizers."
)


def sentences(found: Suggestion) -> Iterator[str]:
    """The choice first, then its reasons."""
    adamw, chosen = found.rows[0], found.chosen
    zero = chosen.estimate.zero
    momentum = "" if found.momentum_dtype == "float32" else f" with {found.momentum_dtype} momentum"
    yield f"{found.optimizer}{momentum}, at ZeRO-{zero.stage} on {zero.ranks:,} rank{'s' * (zero.ranks > 1)}."
    saved = adamw.peak - chosen.peak
    states = chosen.saving["model_states"]
    yield (
        f"Peak of a rank {size(chosen.peak)}, AdamW's {size(adamw.peak)}: {_less(saved, chosen.saving['all'])}; model "
        f"states {fixed(states, 1)} % less."
    )
    if found.room is not None:
        yield _what_fits(found, adamw)
    yield f"Why {found.optimizer}: it {CANDIDATES[found.optimizer]}."
    yield from _passed_over(found)
    for usual, own in found.lower:
        if found.room is not None and found.fits(own) and found.fits(chosen):
            also = "AdamW too" if found.fits(usual) else f"AdamW, {size(usual.peak)}, does not"
            yield f"It fits at ZeRO-{own.estimate.zero.stage} as well, in {size(own.peak)} ({also})."
            break
    yield from unused(chosen.request)
    yield _ANY_MODEL


def _less(saved: int, percent: float) -> str:
    return f"{size(saved)} or {fixed(percent, 1)} % less" if saved > 0 else f"{size(-saved)} more"


def _what_fits(found: Suggestion, adamw: EstimateRow) -> str:
    room = f"the {size(found.room or 0)} that tensors may take ({USABLE:.0%} of a GPU)"
    chosen = found.chosen
    if not found.fits(chosen):
        return f"It does not fit in {room}, nor does any of them: {_ways_out(chosen)}."
    usual = "so does AdamW" if found.fits(adamw) else "AdamW does not"
    parts = [f"It fits in {room}; {usual}"]
    if chosen.largest_batch is not None:
        parts.append(f"largest micro-batch {chosen.largest_batch}, AdamW's {adamw.largest_batch}")
    if chosen.fewest is not None:
        parts.append(f"fewest GPUs {chosen.fewest}, AdamW's {adamw.fewest or f'over {RANKS[-1]:,}'}")
    return "; ".join(parts) + "."


def _ways_out(row: EstimateRow) -> str:
    zero = row.estimate.zero
    ways = [f"on {row.fewest} GPUs it does"] if row.fewest else [f"it does not on {RANKS[-1]:,} GPUs either"]
    if row.request.micro_batch > 1:
        ways.append("take a smaller micro-batch")
    if not row.request.checkpointing and row.request.has_passes:
        ways.append("compute activations again (--checkpointing)")
    if zero.stage < 3:
        ways.append(f"raise the stage from {zero.stage}")
    if not zero.offload and zero.stage > 0:
        ways.append("offload the optimizer")
    return ", ".join(ways)


def _passed_over(found: Suggestion) -> Iterator[str]:
    """Of the candidates before the choice, why not."""
    for row in found.rows[1:]:
        if row is found.chosen or found.fits(row):
            return
        if found.fits(found.chosen):
            yield f"Not {row.estimate.optimizer.name}: it needs {size(row.peak)}."
