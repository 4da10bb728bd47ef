"""Passes over the cells of a comparison, each with its own seed: one row a cell, and what they can tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median

from ds_optim.report.cells import merge_cells
from ds_optim.report.schema import Row

ENOUGH_ROUNDS = 5
"""Passes over all cells from which on a difference of times is told from noise: where their ranges are apart. Of times
that differ by nothing 1 in 126 pairs of five would lie so; of three 1 in 10, and a table has a dozen pairs."""
_WITHIN, _DISAGREE = "within the spread", "seeds disagree"
OF_THIS_CELL = (_WITHIN, _DISAGREE)
"""Doubts that belong to one difference; others to all of them, and are said once."""


def losses_by_seed(row: Row) -> dict[str, float]:
    """The validation losses of a merged row's repeats; of one run nothing."""
    found: dict[str, float] = row.extra.get("val_loss_by_seed", {})
    return found


def rounds(row: Row) -> int:
    """How often a merged row's cell ran."""
    return int(row.extra.get("repeats", 1))


def loss_doubt(row: Row, base: Row) -> str:
    """Why several seeds do not tell two losses apart. Seeds are paired: the same data in the same order, from the same
    weights. That one seed tells nothing is said of all losses together."""
    own, theirs = losses_by_seed(row), losses_by_seed(base)
    signs = {own[seed] < theirs[seed] for seed in own if seed in theirs}
    return _DISAGREE if len(signs) > 1 else ""


def time_doubt(row: Row, base: Row) -> str:
    """Why two times are not told apart."""
    if min(rounds(row), rounds(base)) < ENOUGH_ROUNDS:
        return "too few rounds"
    if row.ms_low is None or row.ms_high is None or base.ms_low is None or base.ms_high is None:
        return _WITHIN
    return _WITHIN if row.ms_low <= base.ms_high and base.ms_low <= row.ms_high else ""


def ends(values: Iterable[float]) -> tuple[float | None, float | None]:
    """The least and the most of several."""
    known = list(values)
    return (min(known), max(known)) if len(known) > 1 else (None, None)


def merge_repeats(rows: Sequence[Row]) -> list[Row]:
    """One row a cell: of its repeats, each with a seed of its own, the median time and tokens/s, least and most time
    as the spread, and the mean losses. What else there is does not depend on the seed, and is the first one's.
    """
    return merge_cells(rows, _merged)


def _merged(repeats: Sequence[Row]) -> Row:
    if len(repeats) == 1:
        return repeats[0].model_copy()
    times = [row.ms_per_step for row in repeats if row.ms_per_step is not None]
    rates = [row.tokens_per_s for row in repeats if row.tokens_per_s is not None]
    merged = repeats[0].model_copy(update={"extra": {**repeats[0].extra, "repeats": len(repeats)}})
    if times:
        merged.ms_per_step, merged.ms_low, merged.ms_high = median(times), min(times), max(times)
    if rates:
        merged.tokens_per_s = median(rates)
    losses = {str(row.seed): row.val_loss for row in repeats if row.val_loss is not None}
    if losses:
        merged.val_loss = mean(losses.values())
        merged.extra["val_loss_by_seed"] = losses
    if len({len(row.train_loss) for row in repeats}) == 1:
        merged.train_loss = [mean(step) for step in zip(*(row.train_loss for row in repeats), strict=True)]
    return merged
