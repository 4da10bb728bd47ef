"""The report: losses over tokens and time, rates with their neighbours, means with intervals, pairwise p.

Seeds are paired (the same weights and order of text), few, and from an unknown distribution: p is that of the exact
sign-flip test, intervals are Hartigan's typical values (1969), which need differences to be symmetric and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.convergence.study import Block, Rows, Study, losses
from ds_optim.machine.files import write_atomic
from ds_optim.report.plots import Curves, colour_map, draw

MOST_PAIRS = 9
"""Entries of a block beyond which a table of all their pairs is no longer read."""


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of "the mean is 0", from all 2**n signs of n differences (n at most 20)."""
    values = np.asarray(differences)
    signs = np.array(list(product((1.0, -1.0), repeat=values.size)))
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-12)))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(low, high, coverage) for the centre, by Hartigan's theorem: means of all subsets part the line into intervals
    that are equally probable. With n values nothing covers more than 1 - 2**(1 - n)."""
    given = np.asarray(values)
    chosen = np.array(list(product((0.0, 1.0), repeat=given.size)))[1:]
    means = np.sort(chosen @ given / chosen.sum(axis=1))
    cut = max(1, int((1 - level) / 2 * (means.size + 1)))
    return float(means[cut - 1]), float(means[-cut]), 1 - 2 * cut / (means.size + 1)


def tokens_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Tokens at which a run's validation loss first was that low, between validations by a line."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[2] <= loss:
            if before is None:
                return point[0]
            part = (before[2] - loss) / (before[2] - point[2])
            return before[0] + part * (point[0] - before[0])
        before = point
    return None


def runs_of(study: Study, block: Block, name: str, rows: Rows) -> dict[int, Mapping[str, Any]]:
    """An entry's ended runs at a block's model, horizon and seeds, by seed, whichever block they were run for."""
    known = losses(rows)
    values = study.best(block, name, known)
    cells = {seed: study.cell(block, name, values, seed).key for seed in block.seeds} if values is not None else {}
    return {seed: rows[key] for seed, key in cells.items() if known.get(key, float("inf")) < float("inf")}


def by_seed(study: Study, block: Block, rows: Rows) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Rows of a block of seeds, by entry and seed."""
    found = {name: runs_of(study, block, name, rows) for name in block.entries}
    return {name: runs for name, runs in found.items() if runs}


def rates_table(study: Study, block: Block, rows: Rows) -> str:
    """Validation loss by learning rate; whether the best has worse neighbours on both sides."""
    known = losses(rows)
    lines = ["| optimizer | loss by learning rate | best | inside |", "|---|---|---:|---|"]
    for name in block.entries:
        cells, best = study.rates(block, name, known)
        tried = [(c.params["lr"], known[c.key]) for c in cells if c.key in known]
        if not tried or best is None:
            continue
        whole = len(tried) == len(cells) and min(tried)[0] < best < max(tried)[0]
        text = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried)
        lines.append(f"| {name} | {text} | {best:g} | {'yes' if whole else 'not yet'} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def seeds_table(study: Study, block: Block, rows: Rows) -> str:
    """Means and intervals, the difference on the same seeds from what an entry is to be held against (the entry that it
    changes in one thing, else AdamW) with its p, and the tokens that it takes to reach the other's loss."""
    runs = by_seed(study, block, rows)
    if not runs:
        return ""
    means = {name: mean(float(row["val_loss"]) for row in of.values()) for name, of in runs.items()}
    titles = "| optimizer | seeds | mean loss | against | difference | p | tokens to its loss |"
    lines = [titles, "|---|---:|---:|---|---|---:|---:|"]
    for name in sorted(means, key=means.__getitem__):
        other = held_against(study, name)
        against = runs_of(study, block, other, rows) if other in study.entries and other != name else {}
        compared = " | ".join(_compared(runs[name], against, other))
        lines.append(f"| {name} | {len(runs[name])} | {means[name]:.4f} | {compared} |")
    return "\n".join(lines)


def kin_table(study: Study, block: Block, rows: Rows) -> str:
    """The difference of each entry from its kin on the same seeds, with its interval and p; '' where none has any."""
    lines = ["| optimizer | against | difference | p |", "|---|---|---|---:|"]
    for name in block.entries:
        if kin := study.entries[name].kin:
            runs, against = (runs_of(study, block, of, rows) for of in (name, kin))
            if len(_differences(runs, against)) > 1:
                lines.append(f"| {name} | " + " | ".join(_compared(runs, against, kin)[:3]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def held_against(study: Study, name: str) -> str:
    """The entry that this one changes in one thing, else AdamW."""
    return study.entries[name].like or "adamw"


def gaps(study: Study, block: Block, name: str, rows: Rows) -> tuple[str, list[float]]:
    """What an entry is held against, and its differences from that by seed; none for AdamW itself."""
    other = held_against(study, name)
    runs, against = (runs_of(study, block, of, rows) for of in (name, other))
    return other, list(_differences(runs, against).values()) if name != other else []


def _differences(runs: Mapping[int, Any], against: Mapping[int, Any]) -> dict[int, float]:
    """By seed that both have."""
    return {seed: runs[seed]["val_loss"] - against[seed]["val_loss"] for seed in sorted(set(runs) & set(against))}


def _compared(runs: Mapping[int, Any], against: Mapping[int, Any], other: str) -> tuple[str, str, str, str]:
    """Cells of a row: against what, the difference with its interval, p, and the share of tokens."""
    by = _differences(runs, against)
    if len(by) < 2:
        return ("–",) * 4
    differences, both = list(by.values()), list(by)
    low, high, coverage = interval(differences)
    gap = f"{mean(differences):+.4f} ({low:+.4f} to {high:+.4f}, {coverage:.0%})"
    reached = [tokens_to(runs[seed]["curve"], against[seed]["val_loss"]) for seed in both]
    parts = [r / against[s]["tokens"] for r, s in zip(reached, both, strict=True) if r is not None]
    share = f"{mean(parts):.0%}" if len(parts) == len(both) else f"{len(parts)} of {len(both)} reach it"
    return other, gap, f"{sign_flip_p(differences):.3f}", share


def ranking_table(study: Study, model: str, horizon: float, rows: Rows) -> str:
    """All tuned entries of a model and horizon by mean loss, each with the ranks that the seeds leave open: one more
    than are better, and as many as are not worse, in the sign-flip test at 5 % without correction."""
    blocks = [b for b in study.blocks if (b.kind, b.model, b.horizon) == ("seeds", model, horizon)]
    runs: dict[str, dict[int, float]] = {}
    for block in blocks:
        for name, of in by_seed(study, block, rows).items():
            if not study.entries[name].like and len(study.entries[name].lr) > 1:
                # (of two blocks that have it the first: a mean over the same seeds as the others')
                runs.setdefault(name, {seed: float(row["val_loss"]) for seed, row in of.items()})
    if len(runs) < 3:
        return ""
    apart = {
        (one, other): [runs[one][seed] - runs[other][seed] for seed in set(runs[one]) & set(runs[other])]
        for one in runs
        for other in runs
        if one != other
    }
    told = {pair: mean(of) for pair, of in apart.items() if len(of) > 1 and sign_flip_p(of) <= 0.05}
    lines = ["| place | optimizer | mean loss | could be |", "|---:|---|---:|---|"]
    for place, name in enumerate(sorted(runs, key=lambda name: mean(runs[name].values())), 1):
        best = 1 + sum(told.get((name, other), 0.0) > 0 for other in runs)
        worst = len(runs) - sum(told.get((name, other), 0.0) < 0 for other in runs)
        lines.append(f"| {place} | {name} | {mean(runs[name].values()):.4f} | {best} to {worst} |")
    return "\n".join(lines)


def pairs_table(study: Study, block: Block, rows: Rows) -> str:
    """p of each pair of optimizers over the seeds that both have."""
    of = {name: {s: r["val_loss"] for s, r in runs.items()} for name, runs in by_seed(study, block, rows).items()}
    names = sorted(of, key=lambda name: mean(of[name].values()))
    if len(names) < 2:
        return ""
    lines = ["| p | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for one in names:
        cells = []
        for other in names:
            both = sorted(set(of[one]) & set(of[other]))
            apart = [of[one][seed] - of[other][seed] for seed in both]
            cells.append("" if one == other or len(both) < 2 else f"{sign_flip_p(apart):.3f}")
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tables(study: Study, block: Block, rows: Rows) -> list[str]:
    if block.kind == "rates":
        return [rates_table(study, block, rows)]
    if block.kind == "axes":
        return []
    tables = [table(study, block, rows) for table in (seeds_table, kin_table)]
    if len(block.entries) <= MOST_PAIRS:
        tables.append(pairs_table(study, block, rows))
    return tables


def write_report(study: Study, rows: Rows, out: Path) -> Path:
    """``report.md`` with its plots in ``out``; the file's path."""
    parts = ["# Convergence study", f"{len(rows)} runs."]
    colours = colour_map(list(study.entries))
    for model, horizon in dict.fromkeys((block.model, block.horizon) for block in study.blocks):
        if table := ranking_table(study, model, horizon, rows):
            parts += [f"## Ranking: {model}, {horizon:g} tokens a parameter", table]
    for block in study.blocks:
        tables = [table for table in _tables(study, block, rows) if table]
        if not tables:
            continue
        parts.append(f"## {block.name}: {block.model}, {block.horizon:g} tokens a parameter, {block.data}")
        parts += tables
        if block.kind == "seeds":
            for over, place, unit in (("tokens", 0, 1e6), ("seconds", 3, 1.0)):
                plot = curves(study, block, rows, over, place, unit)
                parts.append(f"![{plot.title}]({draw(plot, out, colours).png})")
    path = out / "report.md"
    write_atomic(path, "\n\n".join(parts) + "\n")
    return path


def curves(study: Study, block: Block, rows: Rows, over: str, place: int, unit: float) -> Curves:
    """Validation loss of a block's entries, the mean of their seeds, over column ``place`` of a run's curve."""
    series = {}
    for name, runs in by_seed(study, block, rows).items():
        points = np.array([row["curve"] for row in runs.values()]).mean(axis=0)
        series[name] = (list(points[:, place] / unit), list(points[:, 2]))
    label = "million tokens" if over == "tokens" else "seconds of one machine"
    name = f"{block.name.replace(' ', '-')}-{over}"
    return Curves(
        name=name, title=f"Validation loss over {over}: {block.name}", x_label=label, y_label="nats a token",
        series=series, levels={},
    )  # fmt: skip
