"""Line and bar plots, as SVG that takes the page's text colour and as PNG for Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from ds_optim.machine.files import drop_link

# Ink that no plot uses otherwise: in the SVG it is replaced by currentColor, so that axes and text follow the page.
_INK = "#010203"
_PAPER_INK = "#24292f"
_PALETTE = (
    "#7a8793",
    "#e07b39",
    "#3b82c4",
    "#2fa36b",
    "#a06cd5",
    "#d9568c",
    "#a89b2d",
    "#2aa5b8",
    "#d64545",
    "#8c6239",
)
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over steps. ``series`` maps a name to its (x, y) points; ``levels`` are dashed horizontal lines."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    levels: Mapping[str, float]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        return _curves(self, colours, ink)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars in groups. ``groups`` maps a group's name to (label, value) pairs; None is a failed cell."""

    name: str
    title: str
    groups: Mapping[str, Sequence[tuple[str, float | None]]]
    text: Callable[[float | None], str]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        return _bars(self, colours, ink)


class Plot(Protocol):
    """Anything with a name for its file, a title, and a way to be drawn with matplotlib."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        """The figure; ``colours`` by label, ``ink`` of axes and text."""
        ...


@dataclass(frozen=True, kw_only=True)
class DrawnPlot:
    """A plot ready for a page: inline SVG, and the PNG's path relative to the report."""

    name: str
    title: str
    svg: str
    png: str


def draw(plot: Plot, folder: Path, colours: Mapping[str, str]) -> DrawnPlot:
    """Draw ``plot`` into ``folder``/plots and return it."""
    import matplotlib

    matplotlib.use("Agg")
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    png = Path("plots") / f"{plot.name}.png"
    settings = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": plot.name}
    with matplotlib.rc_context(settings):
        figure = plot.figure(colours, _PAPER_INK)
        drop_link(folder / png)
        figure.savefig(folder / png, dpi=150, facecolor="white")
        figure = plot.figure(colours, _INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return DrawnPlot(name=plot.name, title=plot.title, svg=_inline(buffer.getvalue(), plot.title), png=png.as_posix())


def colour_map(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same in every plot of a report."""
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(dict.fromkeys(names))}


def _curves(plot: Curves, colours: Mapping[str, str], ink: str) -> Any:
    figure, axes = new_figure(6.4, 3.6, ink)
    for index, (name, (x, y)) in enumerate(plot.series.items()):
        axes.plot(x, y, label=name, color=colours.get(name), linewidth=1.8, linestyle=_DASHES[index % len(_DASHES)])
    for name, level in plot.levels.items():
        axes.axhline(level, color=ink, alpha=0.55, linewidth=1, linestyle=":")
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
            ha="right", color=ink, fontsize=9,
        )  # fmt: skip
    axes.set_xlabel(plot.x_label, color=ink)
    axes.set_ylabel(plot.y_label, color=ink)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=ink, fontsize=9, loc="upper right", ncols=1 + (len(plot.series) > 5))
    return figure


def _bars(plot: Bars, colours: Mapping[str, str], ink: str) -> Any:
    count = sum(len(bars) for bars in plot.groups.values())
    figure, axes = new_figure(6.4, 0.2 + 0.25 * count + 0.36 * len(plot.groups), ink)
    position, ticks, labels = 0.0, [], []
    lengths = [_length(value) for bars in plot.groups.values() for _, value in bars]
    longest = max((length for length in lengths if length is not None), default=0.0) or 1.0
    for group, bars in plot.groups.items():
        axes.text(
            0, position - 0.85, group, transform=axes.get_yaxis_transform(), color=ink, fontsize=9.5,
            fontweight="bold", va="center",
        )  # fmt: skip
        for label, value in bars:
            known = _length(value)
            length = known or 0.0
            axes.barh(position, length, height=0.72, color=colours.get(label), linewidth=0)
            text = "failed" if known is None else plot.text(value)
            axes.text(length + 0.01 * longest, position, text, va="center", color=ink, fontsize=9)
            ticks.append(position)
            labels.append(label)
            position += 1
        position += 1.4
    axes.set_yticks(ticks, labels)
    axes.set_xticks([])
    axes.set_xlim(0, longest * 1.18)
    axes.set_ylim(position - 1.8, -1.3)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def new_figure(width: float, height: float, ink: str) -> Any:
    """A figure and its axes, without a frame above and to the right, in the page's ink."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(colors=ink, labelsize=9)
    return figure, axes


def _length(value: float | None) -> float | None:
    """A bar's length, or None where there is nothing to draw."""
    return None if value is None or not math.isfinite(value) else float(value)


def _inline(svg: str, title: str) -> str:
    """The ``<svg>`` element alone, its ink replaced, scaling with the page, named for screen readers."""
    body = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
