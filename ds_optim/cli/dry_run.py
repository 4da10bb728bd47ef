"""What ``ds-optim train --dry-run`` prints: the run's tokens, memory and hours, and what its source leaves open."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from ds_optim.errors import UserError
from ds_optim.job.deepspeed_json import data_ranks, deepspeed_config
from ds_optim.job.recipes import Recipe
from ds_optim.job.settings import TrainSettings
from ds_optim.machine.meeting import launched
from ds_optim.zero.support import sequences_cut_in


def print_plan(settings: TrainSettings, ranks: int, recipe: Recipe | None, tokens_per_s: float | None) -> int:
    """Print what a run would be; nothing is loaded but the model's shape, and no group of ranks is formed.

    Args:
        tokens_per_s: of all ranks together; without it no hours are said.
    """
    if tokens_per_s is not None and not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
        raise UserError(f"--tokens-per-s is {tokens_per_s}: write the tokens a second of all ranks, such as 1e6")
    if not launched() or os.environ["RANK"] == "0":
        for name, text in plan_rows(settings, ranks, recipe, tokens_per_s):
            print(f"{name:<9} {text}")
    return 0


def plan_rows(
    settings: TrainSettings, ranks: int, recipe: Recipe | None, tokens_per_s: float | None
) -> Iterator[tuple[str, str]]:
    """The lines, each with what it is of."""
    from ds_optim.memory.estimate_shards import parallel_of
    from ds_optim.memory.estimate_sources import load_shape, zero_settings
    from ds_optim.memory.estimate_terms import ZeroSettings
    from ds_optim.memory.side_by_side import EstimateRequest, estimate_rows
    from ds_optim.report.units import size

    shape = load_shape(settings.model or settings.preset, None, settings.seq_len)
    config = deepspeed_config(settings, ranks)
    told, (tensor, experts) = zero_settings(config, shape), parallel_of(config)
    given = {"dtype": settings.dtype, "accumulation": settings.accumulation, **told}
    request = EstimateRequest(
        model=shape,
        optimizers=(settings.optimizer,),
        stages=(settings.stage,),
        ranks=(ranks,),
        zero=ZeroSettings(stage=settings.stage, ranks=ranks, **given),
        optimizer_params={settings.optimizer: settings.resolved_params()},
        micro_batch=settings.micro_batch,
        seq_len=settings.seq_len // (sequences_cut_in(settings.deepspeed) or 1),
        tensor=tensor,
        experts=experts,
    )
    (row,) = estimate_rows(request)
    readers = data_ranks(settings.deepspeed, ranks)  # ranks that share a batch read it once
    a_step = readers * settings.micro_batch * settings.accumulation * settings.seq_len
    tokens = settings.steps * a_step
    if recipe is not None:
        yield "source", recipe.source
        yield "says", recipe.says
    yield "model", f"{shape.name}, {shape.numel:,} parameters"
    yield (
        "step",
        f"{readers} ranks x {settings.micro_batch} sequences x {settings.accumulation} micro-batches x "
        f"{settings.seq_len:,} tokens = {a_step:,} tokens",
    )
    yield "run", f"{settings.steps:,} steps, {_many(tokens)} tokens, {tokens / shape.numel:.1f} a parameter"
    yield "optimizer", f"{settings.optimizer} {settings.resolved_params()}, clip {settings.clip:g}"
    saved = row.saving
    yield (
        "memory",
        f"about {size(row.peak)} a rank at the peak at ZeRO-{settings.stage} in {settings.dtype}, "
        f"{size(row.estimate.largest.model_states)} of it model states ({-saved['model_states']:+.1f}% of AdamW's)",
    )
    if tokens_per_s is not None:
        yield "time", f"{tokens / tokens_per_s / 3600:,.1f} hours at {tokens_per_s:,.0f} tokens/s"
    if recipe is not None:
        yield from (("not said", f"{name}: {why}") for name, why in recipe.unsaid.items())
        yield from (("differs", text) for text in recipe.differs)
        yield from (("doubtful", text) for text in recipe.doubts)


def _many(tokens: int) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:.2f}M"
