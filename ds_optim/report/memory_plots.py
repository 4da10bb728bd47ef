"""Plots of memory: owners stacked on each other, a map over ranks, and what is saved over the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_optim.report.plots import new_figure

_OWNER_COLOURS = {
    "weights": "#3b82c4",
    "gradients": "#2fa36b",
    "master": "#a06cd5",
    "state": "#e07b39",
    "the rest of the peak": "#b6bec6",
}
_DASHES = ("-", "--", ":", "-.")
#: Within this part of each other, curves are drawn as one.
_ALIKE = 0.01


@dataclass(frozen=True, kw_only=True)
class StackedBars:
    """Horizontal bars of parts in bytes. ``groups`` maps a group to (label, parts by owner); None is a failure."""

    name: str
    title: str
    groups: Mapping[str, Sequence[tuple[str, Mapping[str, float] | None]]]
    text: Callable[[float], str]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        bars = [bar for group in self.groups.values() for bar in group]
        figure, axes = new_figure(7.6, 0.7 + 0.27 * len(bars) + 0.36 * len(self.groups), ink)
        longest = max((sum(parts.values()) for _, parts in bars if parts), default=0.0) or 1.0
        position, ticks = 0.0, []
        for group, members in self.groups.items():
            axes.text(
                0, position - 0.85, group, transform=axes.get_yaxis_transform(), color=ink, fontsize=9.5,
                fontweight="bold", va="center",
            )  # fmt: skip
            for label, parts in members:
                self._bar(axes, position, parts, longest, ink)
                ticks.append((position, label))
                position += 1
            position += 1.4
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axes.set_xticks([])
        axes.set_xlim(0, longest * 1.15)
        axes.set_ylim(position - 1.8, -1.3)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        handles, labels = axes.get_legend_handles_labels()
        first = dict(zip(labels, handles, strict=True))
        figure.legend(
            first.values(),
            first.keys(),
            frameon=False,
            labelcolor=ink,
            fontsize=8.5,
            loc="outside lower center",
            ncols=5,
        )
        return figure

    def _bar(self, axes: Any, position: float, parts: Mapping[str, float] | None, longest: float, ink: str) -> None:
        if parts is None:
            axes.text(0.01 * longest, position, "failed", va="center", color=ink, fontsize=9)
            return
        left = 0.0
        for owner, value in parts.items():
            axes.barh(position, value, left=left, height=0.72, color=_OWNER_COLOURS[owner], linewidth=0, label=owner)
            left += value
        axes.text(left + 0.01 * longest, position, self.text(left), va="center", color=ink, fontsize=9)


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A value for each cell (row) and rank (column); None where there is none."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    text: Callable[[float], str]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        import numpy as np
        from matplotlib import colormaps

        width = 2.8 + max(4.0, 0.85 * len(self.columns))
        figure, axes = new_figure(min(width, 24.0), 0.9 + 0.28 * len(self.rows), ink)
        table = np.array([[np.nan if v is None else v for v in row] for row in self.values], dtype=float)
        shades = colormaps["Blues"].with_extremes(bad=(0, 0, 0, 0))
        low, high = np.nanmin(table), np.nanmax(table)
        # The palest shade is kept off the page's white, the darkest off its ink.
        spread = (high - low) or max(abs(high), 1.0)
        axes.imshow(table, aspect="auto", cmap=shades, vmin=low - 0.3 * spread, vmax=high + 0.3 * spread)
        if len(self.columns) <= 16:
            for y, row in enumerate(self.values):
                for x, value in enumerate(row):
                    if value is not None:
                        dark = value > low + 0.6 * spread
                        axes.text(
                            x, y, self.text(value), ha="center", va="center", fontsize=8,
                            color="white" if dark else "#102a43",
                        )  # fmt: skip
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=0 if len(self.columns) <= 8 else 90)
        axes.set_yticks(range(len(self.rows)), self.rows)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, labelsize=8.5)
        return figure


@dataclass(frozen=True, kw_only=True)
class SavingOverRanks:
    """What an optimizer saves against the baseline, over the number of ranks.

    Attributes:
        saved: by optimizer, its momentum's bytes a parameter less than the baseline's, and points (ranks, bytes saved a
            parameter and rank) that were measured.
        shares: by (optimizer, stage), points (ranks, percent of model states saved) of the estimate.
        measured: the same, counted in runs.
    """

    name: str
    title: str
    saved: Mapping[str, tuple[float, Sequence[tuple[int, float]]]]
    shares: Mapping[tuple[str, int], Sequence[tuple[int, float]]]
    measured: Mapping[tuple[str, int], Sequence[tuple[int, float]]]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 4.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, title in zip(panels, ("saved a parameter and rank, bytes", "saved of model states, %"), strict=True):
            _style(axes, title, self._ranks(), ink)
        self._absolute(panels[0], colours, ink)
        self._relative(panels[1], colours)
        panels[0].legend(frameon=False, labelcolor=ink, fontsize=8)
        figure.legend(
            *panels[1].get_legend_handles_labels(), frameon=False, labelcolor=ink, fontsize=8,
            loc="outside lower center", ncols=3,
        )  # fmt: skip
        return figure

    def _ranks(self) -> list[int]:
        return sorted({ranks for points in self.shares.values() for ranks, _ in points})

    def _absolute(self, axes: Any, colours: Mapping[str, str], ink: str) -> None:
        ranks = self._ranks()
        for bytes_saved in sorted({formula for formula, _ in self.saved.values()}, reverse=True):
            line = axes.plot(ranks, [bytes_saved / n for n in ranks], color=ink, linewidth=1, alpha=0.7)[0]
            line.set_label(f"{bytes_saved:.3g} / N")
        for label, (_, points) in self.saved.items():
            axes.plot(
                *zip(*points, strict=True), "o", color=colours.get(label), markersize=6, label=f"{label}, counted"
            )
        axes.set_yscale("log")

    def _relative(self, axes: Any, colours: Mapping[str, str]) -> None:
        stages = list(dict.fromkeys(stage for _, stage in self.shares))
        for names, stage in self._distinct():
            label, points = names[0], self.shares[names[0], stage]
            dash = _DASHES[stages.index(stage) % len(_DASHES)]
            title = f"{' / '.join(names)}, stage {stage}"
            axes.plot(*zip(*points, strict=True), color=colours.get(label), linestyle=dash, linewidth=1.6, label=title)
        for (label, _), points in self.measured.items():
            axes.plot(*zip(*points, strict=True), "o", color=colours.get(label), markersize=6)
        axes.set_ylim(bottom=0)

    def _distinct(self) -> list[tuple[list[str], int]]:
        """Optimizers whose curves at a stage lie on each other, together."""
        groups: list[tuple[list[str], int]] = []
        for (label, stage), points in self.shares.items():
            for names, other in groups:
                drawn = self.shares[names[0], stage] if other == stage else ()
                if drawn and all(
                    abs(a - b) <= _ALIKE * max(a, b) for (_, a), (_, b) in zip(points, drawn, strict=True)
                ):
                    names.append(label)
                    break
            else:
                groups.append(([label], stage))
        return groups


def _style(axes: Any, title: str, ranks: Sequence[int], ink: str) -> None:
    axes.set_title(title, fontsize=10, color=ink)
    axes.set_facecolor("none")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(n) for n in ranks])
    axes.set_xlabel("ranks N", color=ink)
    axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.8)
    axes.tick_params(colors=ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
        spine.set_alpha(0.4)
