"""The plots of ``ds-optim compare``: losses over tokens, and bars of memory and time."""

from __future__ import annotations

from collections.abc import Sequence

from ds_optim.report.cells import grouped
from ds_optim.report.plots import Bars, Curves, Plot
from ds_optim.report.schema import Row
from ds_optim.report.units import milliseconds, size

_SAME = 0.02
"""Nats by which the curves of two stages may differ to be drawn once."""


def compare_plots(rows: Sequence[Row]) -> list[Plot]:
    """Bars of memory, a plot of losses for each stage whose curves are others, and bars of time."""
    groups = grouped(rows, lambda row: (row.run, row.stage))
    states = _bars("model_states", "Model states per rank", groups, "model_state_bytes")
    peaks = _bars("peak_memory", "Peak memory per rank", groups, "peak_bytes")
    times = _bars("ms_per_step", "Time per step, median", groups, "ms_per_step")
    return [plot for plot in (*states, *peaks, *_losses(groups), *times)]


def title_of(run: str, stage: int | None) -> str:
    """What a group of rows is called."""
    return f"ZeRO-{stage}, {run}" if run else f"ZeRO-{stage}"


def _losses(groups: dict[tuple[str, int | None], list[Row]]) -> list[Plot]:
    drawn: dict[tuple[str, int | None], list[Row]] = {}
    same: dict[tuple[str, int | None], list[str]] = {}
    for key, members in groups.items():
        trained = [row for row in members if row.status == "ok" and row.train_loss]
        if not trained:
            continue
        first = next((other for other, before in drawn.items() if other[0] == key[0] and _alike(before, trained)), None)
        if first is None:
            drawn[key] = trained
        else:
            same.setdefault(first, []).append(title_of("", key[1]))
    return [_curves(number, key, trained, same.get(key, [])) for number, (key, trained) in enumerate(drawn.items())]


def _alike(some: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether the curves of two stages lie on each other."""
    if [row.label for row in some] != [row.label for row in others]:
        return False
    pairs = [(row.train_loss, other.train_loss) for row, other in zip(some, others, strict=True)]
    return all(
        len(mine) == len(theirs) and all(abs(a - b) <= _SAME for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in pairs
    )


def _curves(number: int, key: tuple[str, int | None], trained: Sequence[Row], same: Sequence[str]) -> Curves:
    run, stage = key
    also = f"; {', '.join(same)} within {_SAME} nats of it" if same else ""
    entropy = trained[0].unigram_entropy
    tokens = [row.extra.get("tokens_per_step") for row in trained]
    factors = [each or 1 for each in tokens] if all(tokens) else [1] * len(tokens)
    return Curves(
        name=f"loss_{number}_stage{stage}" if run else f"loss_stage{stage}",
        title=f"Training loss, {title_of(run, stage)}{also}",
        x_label="tokens" if all(tokens) else "step",
        y_label="loss, nats per token",
        series={
            row.label: ([step * each for step in range(1, len(row.train_loss) + 1)], row.train_loss)
            for row, each in zip(trained, factors, strict=True)
        },
        levels={} if entropy is None else {"unigram entropy": entropy},
    )


def _bars(name: str, title: str, groups: dict[tuple[str, int | None], list[Row]], field: str) -> list[Plot]:
    bars = {title_of(*key): [(row.label, getattr(row, field)) for row in rows] for key, rows in groups.items()}
    if all(value is None for members in bars.values() for _, value in members):
        return []
    times = field == "ms_per_step"
    spans = {
        (title_of(*key), row.label): (row.ms_low, row.ms_high)
        for key, rows in groups.items()
        for row in rows
        if times and row.ms_low is not None and row.ms_high is not None
    }
    return [Bars(name=name, title=title, groups=bars, text=milliseconds if times else size, spans=spans)]
