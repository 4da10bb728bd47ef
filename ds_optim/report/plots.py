"""Line and bar plots, as SVG that takes the page's text colour and as PNG for Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any, Protocol

from ds_optim.machine.files import drop_link
from ds_optim.optimizers.registry import OPTIMIZERS, plain_name

# Ink that no plot uses otherwise: in the SVG it is replaced by currentColor, so that axes and text follow the page.
_INK = "#010203"
PAPER_INK = "#24292f"
_GROUP = re.compile(r'<g id="[\w.]+"')
#: One for each registered optimizer, in their order: dark enough for white paper, light enough for a dark page.
_PALETTE = (
    *("#74801a", "#176882", "#4650e8", "#9b4b7b", "#267329"),
    *("#a89b2d", "#2aa5b8", "#d64545", "#8c6239", "#e07b39", "#3b82c4", "#2fa36b", "#a06cd5", "#d9568c"),
    *("#6b5aaf", "#d41bca", "#aa0ab8", "#0c8f2a", "#8e3df5"),
)
_BASELINE = "#7a8793"
_PALER = (0.0, 0.3, 0.5, 0.65)
"""How much white is in the colour of an optimizer's first, second, ... row, where one report has several."""
WIDTH = 5.2
"""Inches of a figure whose text is still read on the narrowest screens; wider ones scroll there."""
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))


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
class Curves:
    """Lines over steps. ``series`` maps a name to its (x, y) points; ``levels`` are dashed horizontal lines."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    levels: Mapping[str, float]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        figure, axes = new_figure(WIDTH, 3.3, ink)
        for index, (name, (x, y)) in enumerate(self.series.items()):
            axes.plot(x, y, label=name, color=colours.get(name), linewidth=1.8, linestyle=_DASHES[index % len(_DASHES)])
        for name, level in self.levels.items():
            axes.axhline(level, color=ink, alpha=0.55, linewidth=1, linestyle=":")
            axes.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
                ha="right", color=ink, fontsize=9,
            )  # fmt: skip
        axes.set_xlabel(self.x_label, color=ink)
        axes.set_ylabel(self.y_label, color=ink)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=ink, alpha=0.15, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, labelcolor=ink, fontsize=9, loc="upper right", ncols=1 + (len(self.series) > 5))
        return figure


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars in groups.

    ``groups`` maps a group's name to pairs of a label and a value, or the values of the parts that are stacked; None is
    a failed cell. ``parts``: the colours of such parts, for which there is a legend, or of labels that no optimizer
    has. ``spans``: by group and label the least and the most that were measured, drawn as a line through the bar's end.
    ``limits``: by group and label what a bar is held against, drawn as a stroke across it; ``limit`` names that.
    """

    name: str
    title: str
    groups: Mapping[str, Sequence[tuple[str, float | Mapping[str, float] | None]]]
    text: Callable[[float], str]
    parts: Mapping[str, str] = field(default_factory=dict)
    spans: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    limits: Mapping[tuple[str, str], float] = field(default_factory=dict)
    limit: str = "limit"

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        groups = {name: [(label, _parts(label, value)) for label, value in bars] for name, bars in self.groups.items()}
        count = sum(map(len, groups.values()))
        stacked = any(isinstance(value, Mapping) for bars in self.groups.values() for _, value in bars)
        legend = stacked or bool(self.limits)
        figure, axes = new_figure(WIDTH, (0.6 if legend else 0.2) + 0.25 * count + 0.36 * len(groups), ink)
        lengths = [sum(parts.values()) for bars in groups.values() for _, parts in bars if parts]
        longest = max([*lengths, *self.limits.values(), *(high for _, high in self.spans.values())], default=0) or 1.0
        position, ticks = 0.0, []
        for name, bars in groups.items():
            axes.text(
                0, position - 0.85, name, transform=axes.get_yaxis_transform(), color=ink, fontsize=9.5,
                fontweight="bold", va="center",
            )  # fmt: skip
            for label, parts in bars:
                end = 0.0
                for part, length in (parts or {}).items():
                    colour, named = self.parts.get(part, colours.get(part)), part if stacked else None
                    axes.barh(position, length, left=end, height=0.72, color=colour, linewidth=0, label=named)
                    end += length
                text = "failed" if parts is None else self.text(end)
                end = max(end, self._marks(axes, (name, label), position, ink))
                axes.text(end + 0.015 * longest, position, text, va="center", color=ink, fontsize=9)
                ticks.append((position, label))
                position += 1
            position += 1.4
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axes.set_xticks([])
        axes.set_xlim(0, longest * 1.18)
        axes.set_ylim(position - 1.8, -1.3)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if legend:
            legend_beneath(figure, axes, ink, columns=3 if stacked else 1)
        return figure

    def _marks(self, axes: Any, bar: tuple[str, str], position: float, ink: str) -> float:
        """Draw a bar's spread and its limit; where the last of them ends."""
        low, high = self.spans.get(bar, (0.0, 0.0))
        if high:
            axes.plot([low, high], [position, position], color=ink, linewidth=1.2, alpha=0.7)
        limit = self.limits.get(bar, 0.0)
        if limit:
            across = [position - 0.48, position + 0.48]
            axes.plot([limit, limit], across, color=ink, linewidth=1.6, linestyle=(0, (2, 1)), label=self.limit)
        return max(high, limit)


@dataclass(frozen=True, kw_only=True)
class DrawnPlot:
    """A plot for a page: inline SVG, and the PNG's path relative to the report. ``wide``: it scrolls if it must."""

    name: str
    title: str
    svg: str
    png: str
    wide: bool = False


def draw(plot: Plot, folder: Path, colours: Mapping[str, str]) -> DrawnPlot:
    """Draw ``plot`` into ``folder``/plots and return it."""
    import matplotlib

    matplotlib.use("Agg")
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    png = Path("plots") / f"{plot.name}.png"
    settings = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": plot.name}
    with matplotlib.rc_context(settings):
        figure = plot.figure(colours, PAPER_INK)
        drop_link(folder / png)
        figure.savefig(folder / png, dpi=150, facecolor="white")
        figure = plot.figure(colours, _INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg, wide = _inline(buffer.getvalue(), plot.title), figure.get_figwidth() > WIDTH
    return DrawnPlot(name=plot.name, title=plot.title, svg=svg, png=png.as_posix(), wide=wide)


def colour_map(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same in every report: grey for AdamW, for each registered optimizer its own with any
    dtype, greyer where it is DeepSpeed's, and paler where the report has it before. Other names take what is free."""
    own = {name: colour for name in names if (colour := _own_colour(name))}
    found, before = {}, list(own.values())
    for place, (name, colour) in enumerate(own.items()):
        found[name] = _mixed(colour, "#ffffff", _PALER[min(before[:place].count(colour), len(_PALER) - 1)])
    free = [colour for colour in reversed(_PALETTE) if colour not in before] or list(_PALETTE)
    others = [name for name in dict.fromkeys(names) if name not in own]
    return found | {name: free[number % len(free)] for number, name in enumerate(others)}


def _own_colour(name: str) -> str:
    """Of an optimizer, whatever its momentum is stored in; empty where none is called so."""
    whose, _, plain = plain_name(name.partition(",")[0]).rpartition(":")
    order = [plain_name(registered) for registered in OPTIMIZERS][: len(_PALETTE)]
    if plain != "adamw" and plain not in order:
        return ""
    colour = _BASELINE if plain == "adamw" else _PALETTE[order.index(plain)]
    return _mixed(colour, _BASELINE, 0.55) if whose else colour


def _mixed(colour: str, other: str, share: float) -> str:
    """``colour`` with so much of ``other`` in it."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(own + share * (theirs - own)) for own, theirs in pairs).hex()


def new_figure(
    width: float, height: float, ink: str, panels: int = 1, *, below: bool = False, **options: Any
) -> tuple[Any, Any]:
    """A figure and its axes (several panels, beside or ``below`` each other: an array of them), without a frame above
    and to the right, in ``ink``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (panels, 1) if below else (1, panels)
    made = figure.subplots(*shape, squeeze=False, **options).ravel()
    for axes in made:
        axes.set_facecolor("none")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
            spine.set_alpha(0.4)
        axes.tick_params(colors=ink, labelsize=9)
    return figure, made[0] if panels == 1 else made


def legend_beneath(figure: Any, axes: Any, ink: str, columns: int) -> None:
    """The legend of ``axes`` under the whole figure, each label once, in as many lines as its column asks for."""
    handles, labels = axes.get_legend_handles_labels()
    letters = round(14 * figure.get_figwidth() / columns) - 7
    named = {fill(label, letters): handle for label, handle in zip(labels, handles, strict=True)}
    style = {"frameon": False, "labelcolor": ink, "fontsize": 9}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, **style)


def _parts(label: str, value: float | Mapping[str, float] | None) -> Mapping[str, float] | None:
    """A bar's parts, a plain value as its only one; None where there is nothing to draw."""
    if value is None or isinstance(value, Mapping):
        return value
    return {label: value} if math.isfinite(value) else None


def _inline(svg: str, title: str) -> str:
    """The ``<svg>`` element alone, its ink replaced, scaling with the page, named for screen readers; without names of
    its groups, which a page of several plots would have twice."""
    body = _GROUP.sub("<g", svg[svg.index("<svg") :].replace(_INK, "currentColor"))
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
