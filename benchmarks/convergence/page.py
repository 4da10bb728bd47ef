"""The tables and pictures of docs/evidence.md, from the committed rows alone.

    python -m benchmarks.convergence --page

A mark ``<!-- study: KIND: BLOCK, BLOCK -->`` stands before each of them, ``<!-- end -->`` after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.convergence.report import (
    by_seed,
    curves,
    gaps,
    interval,
    kin_table,
    pairs_table,
    ranking_table,
    seeds_table,
)
from benchmarks.convergence.study import Block, Rows, Study, losses
from ds_optim.report.plots import colour_map, draw, new_figure

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
IMAGES = PAGE.parent / "images"
MARK = re.compile(
    r"(?P<mark><!-- study: (?P<kind>\w+): (?P<blocks>[^>]+?) -->\n)(?P<body>.*?)(?=<!-- end -->)", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Differences of loss by name, each a mean and an interval, and a line at zero."""

    name: str
    title: str
    of: Mapping[str, tuple[float, float, float]]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        figure, axes = new_figure(6.4, 0.9 + 0.24 * len(self.of), ink)
        right = self.right()
        for place, (name, (centre, low, high)) in enumerate(self.of.items()):
            colour = colours.get(name, ink)
            if low > right:  # an arrow to where it would be
                axes.plot([right], [place], color=colour, marker=">", markersize=5, clip_on=False)
                axes.text(right, place, f"{centre:+.2f}   ", color=ink, ha="right", va="center", fontsize=9)
                continue
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([centre], [place], color=colour, marker="o", markersize=5)
        if right < math.inf:
            axes.set_xlim(right=right)
        axes.axvline(0, color=ink, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(self.of)), list(self.of))
        axes.invert_yaxis()
        axes.set_xlabel("nats a token; left of the line is better", color=ink)
        axes.grid(axis="x", color=ink, alpha=0.15, linewidth=0.8)
        return figure

    def right(self) -> float:
        """The end of the axis: where one interval lies so far out that the others would not be seen beside it, short
        of that one."""
        *_, second, last = sorted((0.0, 0.0, *(high for _, _, high in self.of.values())))
        return 1.3 * second if last > 3 * second > 0 else math.inf


def blocks_of(study: Study, names: str) -> list[Block]:
    """Blocks by their names, comma-separated."""
    known = {block.name: block for block in study.blocks}
    return [known[name.strip()] for name in names.split(",")]


def tuned_table(study: Study, blocks: list[Block], rows: Rows) -> str:
    """What tuning came to, with the losses at the neighbours of the best rate (of no held-out seed); '' without any."""
    known = losses(rows)
    lines = ["| optimizer | learning rate: loss | then | trials | loss |", "|---|---|---|---:|---:|"]
    for block in blocks:
        for name in block.entries:
            values = study.best(block, name, known)
            if values is None or study.entries[name].like or len(study.entries[name].lr) == 1:
                continue
            cells, best = study.rates(block, name, known)
            near = sorted((cell.params["lr"], known[cell.key]) for cell in cells)
            at = [rate for rate, _ in near].index(best)
            rates = ", ".join(f"{'**' * (rate == best)}{rate:g}{'**' * (rate == best)}: {loss:.3f}"
                              for rate, loss in near[max(0, at - 1) : at + 2])  # fmt: skip
            given = study.entries[name].params
            moved = [f"{key} {value}" for key, value in values.items() if key != "lr" or value != best]
            tried = {c.key for b in study.blocks if b.fits(block) and b.kind != "seeds" and name in b.entries
                     for c in study.wanted(b.model_copy(update={"entries": (name,)}), known)}  # fmt: skip
            loss = known[study.cell(block, name, values, 0).key]
            fixed = "".join(f", {key} {value}" for key, value in given.items() if key not in values and key != "betas")
            lines.append(f"| {name} | {rates} | {', '.join(moved) or 'as it is'}{fixed} | {len(tried)} | {loss:.3f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def gaps_picture(study: Study, blocks: list[Block], rows: Rows) -> str:
    """Each entry's difference from what it is held against, drawn, best first; '' without seeds."""
    found: dict[str, tuple[float, float, float]] = {}
    for block in blocks:
        for name in by_seed(study, block, rows):
            other, differences = gaps(study, block, name, rows)
            if len(differences) > 1:
                low, high, _ = interval(differences)
                found[f"{name} − {other}"] = (mean(differences), low, high)
    if not found:
        return ""
    title = "Differences of validation loss on the same seeds, with intervals: " + ", ".join(b.name for b in blocks)
    ordered = dict(sorted(found.items(), key=lambda item: item[1][0]))
    plot = Gaps(name="study-gaps-" + blocks[0].name.replace(" ", "-"), title=title, of=ordered)
    return f"![{title}](images/{draw(plot, IMAGES, {}).png})"


def curves_picture(study: Study, blocks: list[Block], rows: Rows) -> str:
    """Mean validation loss over tokens of a block's entries; '' without seeds."""
    if not by_seed(study, blocks[0], rows):
        return ""
    plot = curves(study, blocks[0], rows, "tokens", 0, 1e6)
    return f"![{plot.title}](images/{draw(plot, IMAGES, colour_map(list(study.entries))).png})"


def joined(table: Callable[[Study, Block, Rows], str]) -> Callable[[Study, list[Block], Rows], str]:
    """A table a block, one under the other."""
    return lambda study, blocks, rows: "\n\n".join(filter(None, (table(study, block, rows) for block in blocks)))


KINDS: Mapping[str, Callable[[Study, list[Block], Rows], str]] = {
    "tuned": tuned_table,
    "seeds": joined(seeds_table),
    "kin": joined(kin_table),
    "pairs": joined(pairs_table),
    "ranking": joined(lambda study, block, rows: ranking_table(study, block.model, block.horizon, rows)),
    "gaps": gaps_picture,
    "curves": curves_picture,
}


def filled(text: str, study: Study, rows: Rows) -> str:
    """The page with what stands under its marks made anew; what has no rows yet says so."""

    def section(match: re.Match[str]) -> str:
        made = KINDS[match["kind"]](study, blocks_of(study, match["blocks"]), rows)
        return f"{match['mark']}\n{made or 'Not run yet.'}\n\n"

    return MARK.sub(section, text)
