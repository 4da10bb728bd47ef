"""Line and bar plots, as SVG that takes the page's text colour and as PNG for Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Protocol

from ds_optim.machine.files import drop_link
from ds_optim.optimizers.registry import OPTIMIZERS, plain_name

# Ink that no plot uses otherwise: in the SVG it is replaced by currentColor, so that axes and text follow the page.
_INK = "#010203"
PAPER_INK = "#24292f"
_PALETTE = (
    *("#e07b39", "#3b82c4", "#2fa36b", "#a06cd5", "#d9568c"),
    *("#a89b2d", "#2aa5b8", "#d64545", "#8c6239"),
)
_BASELINE = "#7a8793"
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
        figure, axes = new_figure(5.2, 3.3, ink)
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
    a failed cell. ``parts``: the colours of such parts, for which there is a legend. ``spans``: by group and label the
    least and the most that were measured, drawn as a line through the bar's end.
    """

    name: str
    title: str
    groups: Mapping[str, Sequence[tuple[str, float | Mapping[str, float] | None]]]
    text: Callable[[float], str]
    parts: Mapping[str, str] = field(default_factory=dict)
    spans: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        groups = {name: [(label, _parts(label, value)) for label, value in bars] for name, bars in self.groups.items()}
        count = sum(map(len, groups.values()))
        figure, axes = new_figure(5.2, (0.6 if self.parts else 0.2) + 0.25 * count + 0.36 * len(groups), ink)
        lengths = [sum(parts.values()) for bars in groups.values() for _, parts in bars if parts]
        longest = max([*lengths, *(high for _, high in self.spans.values())], default=0) or 1.0
        position, ticks = 0.0, []
        for name, bars in groups.items():
            axes.text(
                0, position - 0.85, name, transform=axes.get_yaxis_transform(), color=ink, fontsize=9.5,
                fontweight="bold", va="center",
            )  # fmt: skip
            for label, parts in bars:
                end = 0.0
                for part, length in (parts or {}).items():
                    colour = self.parts.get(part, colours.get(part))
                    axes.barh(position, length, left=end, height=0.72, color=colour, linewidth=0, label=part)
                    end += length
                text = "failed" if parts is None else self.text(end)
                if (name, label) in self.spans:
                    low, high = self.spans[name, label]
                    axes.plot([low, high], [position, position], color=ink, linewidth=1.2, alpha=0.7)
                    end = max(end, high)
                axes.text(end + 0.01 * longest, position, text, va="center", color=ink, fontsize=9)
                ticks.append((position, label))
                position += 1
            position += 1.4
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axes.set_xticks([])
        axes.set_xlim(0, longest * 1.18)
        axes.set_ylim(position - 1.8, -1.3)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if self.parts:
            legend_beneath(figure, axes, ink, columns=5)
        return figure


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
        figure = plot.figure(colours, PAPER_INK)
        drop_link(folder / png)
        figure.savefig(folder / png, dpi=150, facecolor="white")
        figure = plot.figure(colours, _INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return DrawnPlot(name=plot.name, title=plot.title, svg=_inline(buffer.getvalue(), plot.title), png=png.as_posix())


def colour_map(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: grey for AdamW, and for each optimizer its own in every report, with any dtype.

    Where two that a report shows have one colour, the later takes the next that is free.
    """
    order = {plain_name(optimizer): index for index, optimizer in enumerate(OPTIMIZERS)}
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        optimizer = plain_name(name.partition(",")[0])
        if optimizer == "adamw":
            found[name] = _BASELINE
            continue
        start = order.get(optimizer, len(order))
        own = [_PALETTE[(start + step) % len(_PALETTE)] for step in range(len(_PALETTE))]
        found[name] = next((colour for colour in own if colour not in found.values()), own[0])
    return found


def new_figure(width: float, height: float, ink: str, panels: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (several panels: an array of them), without a frame above and to the right, in ``ink``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    made = figure.subplots(1, panels, squeeze=False, **options)[0]
    for axes in made:
        axes.set_facecolor("none")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
            spine.set_alpha(0.4)
        axes.tick_params(colors=ink, labelsize=9)
    return figure, made[0] if panels == 1 else made


def legend_beneath(figure: Any, axes: Any, ink: str, columns: int) -> None:
    """The legend of ``axes`` under the whole figure, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    style = {"frameon": False, "labelcolor": ink, "fontsize": 8}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, **style)


def _parts(label: str, value: float | Mapping[str, float] | None) -> Mapping[str, float] | None:
    """A bar's parts, a plain value as its only one; None where there is nothing to draw."""
    if value is None or isinstance(value, Mapping):
        return value
    return {label: value} if math.isfinite(value) else None


def _inline(svg: str, title: str) -> str:
    """The ``<svg>`` element alone, its ink replaced, scaling with the page, named for screen readers."""
    body = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
