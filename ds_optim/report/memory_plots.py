"""Plots of memory: a map over ranks, and what is held and saved over the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ds_optim.report.plots import WIDTH, legend_beneath, new_figure

Points = Sequence[tuple[int, float]]
"""(number of ranks, value) pairs."""
Key = TypeVar("Key", bound=Hashable)

#: Of parts of memory: paler than those of optimizers, none of which has one of these.
OWNER_COLOURS = {
    "weights": "#6c8ebf",
    "gradients": "#82b366",
    "master": "#b39ddb",
    "state": "#e8a87c",
    "activations": "#7fb8d8",
    "logits": "#d8b84a",
    "gathered layers": "#5b7f95",
    "buckets": "#c98aa8",
    "scratch of the step": "#8a9a5b",
    "the rest of the peak": "#b6bec6",
}
_DASHES = ("-", "--", ":", "-.")
#: Within this part of each other, curves are drawn as one.
_ALIKE = 0.01


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A value for each cell (row) and rank (column); a row may be shorter than the others."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    text: Callable[[float], str]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        import numpy as np

        width = max(WIDTH, 2.0 + 0.85 * len(self.columns))
        figure, axes = new_figure(min(width, 24.0), 0.9 + 0.28 * len(self.rows), ink)
        table = np.full((len(self.rows), len(self.columns)), np.nan)
        for y, row in enumerate(self.values):
            table[y, : len(row)] = row
        low, high = np.nanmin(table), np.nanmax(table)
        spread = (high - low) or max(abs(high), 1.0)
        # Cell by cell, not as one image, so that each has a colour of its own in the page.
        cells = axes.pcolormesh(np.ma.masked_invalid(table), cmap="Blues", vmin=low - 0.3 * spread, vmax=high)
        axes.invert_yaxis()
        for (y, x), value in np.ndenumerate(table):
            if len(self.columns) <= 16 and np.isfinite(value):
                light = np.dot([0.2126, 0.7152, 0.0722], np.power(cells.to_rgba(value)[:3], 2.2))
                colour = "black" if light > 0.18 else "white"  # where both stand out alike
                axes.text(x + 0.5, y + 0.5, self.text(float(value)), ha="center", va="center", fontsize=9, color=colour)
        turned = 0 if len(self.columns) <= 8 else 90
        axes.set_xticks([x + 0.5 for x in range(len(self.columns))], self.columns, rotation=turned)
        axes.set_yticks([y + 0.5 for y in range(len(self.rows))], self.rows)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return figure


@dataclass(frozen=True, kw_only=True)
class SavingOverRanks:
    """What an optimizer saves against the baseline, over the number of ranks.

    Attributes:
        saved: by optimizer, its momentum's bytes a parameter less than the baseline's, and points of the bytes saved a
            parameter and rank.
        shares: by (optimizer, stage), points of the percent of model states saved, as estimated.
        measured: the same, counted in runs.
        how: what the points of ``saved`` are.
    """

    name: str
    title: str
    saved: Mapping[str, tuple[float, Points]]
    shares: Mapping[tuple[str, int], Points]
    measured: Mapping[tuple[str, int], Points]
    how: str = "counted"

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        figure, (absolute, relative) = new_figure(WIDTH, 6.4, ink, panels=2, below=True)
        ranks = sorted({n for points in self.shares.values() for n, _ in points})
        over_ranks(absolute, "saved a parameter and rank, bytes", ranks, ink)
        over_ranks(relative, "saved of model states, %", ranks, ink)
        for bytes_saved in sorted({formula for formula, _ in self.saved.values()}, reverse=True):
            formula = [bytes_saved / n for n in ranks]
            absolute.plot(ranks, formula, color=ink, linewidth=1, alpha=0.7, label=f"{bytes_saved:.3g} / N")
        counted = {label: points for label, (_, points) in self.saved.items()}
        for names in alike(counted):
            _dots(absolute, counted[names[0]], colours.get(names[0]), label=f"{' / '.join(names)}, {self.how}")
        for dash, stage in zip(_DASHES, dict.fromkeys(stage for _, stage in self.shares), strict=False):
            curves = {label: points for (label, of), points in self.shares.items() if of == stage}
            for names in alike(curves):
                title, colour = f"{' / '.join(names)}, stage {stage}", colours.get(names[0])
                points = curves[names[0]]
                relative.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.6, label=title)
        for (label, _), points in self.measured.items():
            _dots(relative, points, colours.get(label))
        absolute.set_yscale("log")
        absolute.yaxis.set_major_formatter("{x:g}")
        relative.set_ylim(bottom=0)
        absolute.legend(frameon=False, labelcolor=ink, fontsize=9)
        legend_beneath(figure, relative, ink, columns=2)
        return figure


def _dots(axes: Any, points: Points, colour: str | None, label: str | None = None) -> None:
    axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=6, label=label)


def over_ranks(axes: Any, title: str, ranks: Sequence[int], ink: str) -> None:
    """Numbers of ranks, which double, along x."""
    axes.set_title(title, fontsize=10, color=ink)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(n) for n in ranks])
    axes.set_xlabel("ranks N", color=ink)
    axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.8)


def alike(curves: Mapping[Key, Points]) -> list[list[Key]]:
    """The names of curves, those together that lie on each other."""
    groups: list[list[Key]] = []
    for name, points in curves.items():
        for group in groups:
            pairs = zip(points, curves[group[0]], strict=True)
            if all(abs(a - b) <= _ALIKE * max(a, b) for (_, a), (_, b) in pairs):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
