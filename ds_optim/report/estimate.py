"""The table and the curves of ``ds-optim estimate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_optim.memory.estimate import ACTIVATIONS, estimate
from ds_optim.memory.estimate_fit import RANKS, USABLE
from ds_optim.memory.side_by_side import BASELINE, EstimateRequest, EstimateRow
from ds_optim.report.plots import colour_map
from ds_optim.report.units import MISSING, fixed, size

if TYPE_CHECKING:
    from rich.table import Table

_GIB = 2**30
_FORMATS = ("png", "svg")


def to_table(rows: Sequence[EstimateRow]) -> Table:
    """GiB of the rank that needs most, by term, and the saving against AdamW."""
    from rich.table import Table

    request = rows[0].request
    table = Table(title=_title(request), title_justify="left", header_style="bold")
    for title in ("Ranks", "Stage", "Optimizer", "Momentum"):
        table.add_column(title, no_wrap=True)
    numbers = ["Weights", "Gradients", "Master", "State", "Model states", "Buckets", "Gathered", "Step", "Peak"]
    if request.zero.offload:
        numbers.append("On host")
    for title in (*numbers, "Saves of state", "of model states", "of peak", *_fit_titles(request)):
        table.add_column(title, justify="right")
    previous: object = None
    for row in rows:
        settings = row.estimate.zero
        if previous not in (None, (settings.ranks, settings.stage)):
            table.add_section()
        previous = settings.ranks, settings.stage
        table.add_row(*_cells(row))
    return table


def notes(request: EstimateRequest) -> list[str]:
    """What the figures of the table are, one line each."""
    lines = [
        "GiB of the rank that needs most. Gradients: "
        + ("at their most between micro-batches. " if request.zero.accumulation > 1 else "before the step. ")
        + "Step: its gradients, exchanged matrices and scratch of an update.",
        "Peak: model states with the larger of backward (buckets, gathered layers, activations) and step.",
    ]
    if request.model.counted:
        lines.insert(0, f"Counted: {request.model.counted}.")
    if request.zero.bf16_masters:
        lines.append("Master weights are bf16 from stage 1 on; savings are against AdamW with fp32 ones.")
    if request.sequence_bytes:
        amount = size(request.sequence_bytes * request.micro_batch)
        how = "with" if request.checkpointing else "without"
        whose = ", of the text decoder alone," if request.model.has_towers else ""
        lines.append(
            f"Activations, {amount} for {request.micro_batch} x {request.seq_len} tokens {how} checkpointing{whose} are"
            f" {ACTIVATIONS}."
        )
    else:
        lines.append("Activations are left out: a decoder's widths are not known of this model.")
    if request.gpu_bytes is not None:
        lines.append(f"What fits leaves {1 - USABLE:.0%} of {size(request.gpu_bytes)} free; up to {RANKS[-1]} GPUs.")
    return lines


def draw_curves(request: EstimateRequest, out: Path) -> list[Path]:
    """Model states over ranks, a panel a stage, and what is saved over N, the formula 4/N drawn on it."""
    import matplotlib

    matplotlib.use("Agg")
    ranks = [1]
    while ranks[-1] < max(64, *request.ranks):
        ranks.append(2 * ranks[-1])
    out.mkdir(parents=True, exist_ok=True)
    points = _points(request, ranks)
    written = []
    for name, figure in (
        ("model_states", _states(request, ranks, points)),
        ("saving", _saving(request, ranks, points)),
    ):
        for suffix in _FORMATS:
            path = out / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written


Points = dict[tuple[str, int], list[tuple[int, int]]]
"""By optimizer and stage: (model states, optimizer state) of the largest rank, at each number of ranks."""


def _title(request: EstimateRequest) -> str:
    offload = ", optimizer offloaded" if request.zero.offload else ""
    return f"{request.model.name}: {request.model.numel:,} parameters, {request.zero.dtype}{offload}"


def _fit_titles(request: EstimateRequest) -> list[str]:
    if request.gpu_bytes is None:
        return []
    return [*(["Largest batch"] if request.sequence_bytes else []), "Fewest GPUs"]


def _cells(row: EstimateRow) -> list[str]:
    memory, settings = row.estimate.largest, row.estimate.zero
    step = memory.step_gradients + memory.exchange + memory.chunks
    sizes = [
        *(memory.weights, memory.gradients + memory.accumulating, memory.master, memory.optimizer_state),
        *(memory.most_model_states, memory.buckets, memory.gathered, step, row.peak),
    ]
    if row.request.zero.offload:
        sizes.append(memory.host + memory.host_buckets)
    cells = [str(settings.ranks), str(settings.stage), row.estimate.optimizer.name]
    cells += [row.estimate.optimizer.momentum_dtype, *(_gib(value) for value in sizes)]
    is_base = row.estimate is row.baseline
    cells += ["" if is_base else f"{fixed(value, 1)} %" for value in row.saving.values()]
    if row.request.gpu_bytes is not None:
        if row.request.sequence_bytes:
            cells.append(str(row.largest_batch))
        cells.append(MISSING if row.fewest is None else str(row.fewest))
    return cells


def _gib(value: int) -> str:
    scaled = value / _GIB
    return "0" if value == 0 else fixed(scaled, 2) if scaled >= 0.1 else f"{scaled:.2g}"


def _points(request: EstimateRequest, ranks: Sequence[int]) -> Points:
    plans = {_label(plan.name, plan.momentum_dtype): plan for plan in (request.plan(BASELINE), *request.plans())}
    baseline = next(iter(plans))
    points: Points = {}
    for stage in request.stages:
        for label, plan in plans.items():
            at = request.baseline_at if label == baseline else request.at
            found = [estimate(request.model, plan, at(stage, n), transients=False).largest for n in ranks]
            points[label, stage] = [(memory.most_model_states, memory.optimizer_state) for memory in found]
    return _merged(points, request.stages)


def _merged(points: Points, stages: Sequence[int]) -> Points:
    """Optimizers whose curves lie on each other (within a percent) as one, under both names."""
    groups: list[list[str]] = []
    for label in dict.fromkeys(label for label, _ in points):
        same = (group for group in groups if all(_alike(points[group[0], s], points[label, s]) for s in stages))
        group = next(same, None)
        if group is None or BASELINE in (label, group[0]):
            groups.append([label])
        else:
            group.append(label)
    return {(" / ".join(group), stage): points[group[0], stage] for group in groups for stage in stages}


def _alike(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    return all(
        abs(a - b) <= 0.01 * max(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def _label(name: str, momentum_dtype: str) -> str:
    return name if momentum_dtype == "float32" else f"{name}, {momentum_dtype}"


def _states(request: EstimateRequest, ranks: Sequence[int], points: Points) -> Any:
    from matplotlib.figure import Figure

    stages = request.stages
    figure = Figure(figsize=(3.2 * len(stages) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(label for label, _ in points))
    colours = colour_map(labels)
    for axes, stage in zip(panels, stages, strict=True):
        for label in labels:
            values = [states / _GIB for states, _ in points[label, stage]]
            axes.plot(ranks, values, label=label, color=colours[label], linewidth=1.8, marker="o", markersize=3)
        _log_ranks(axes, ranks)
        axes.set_yscale("log")
        axes.set_title(f"ZeRO-{stage}", fontsize=10)
    panels[0].set_ylabel("model states of a rank, GiB")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(_title(request), fontsize=10)
    return figure


def _saving(request: EstimateRequest, ranks: Sequence[int], points: Points) -> Any:
    """Bytes a parameter and rank that each optimizer's state saves, and what share of model states that is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    absolute, relative = figure.subplots(1, 2)
    sharded = [stage for stage in request.stages if stage > 0] or list(request.stages)
    labels = [label for label in dict.fromkeys(label for label, _ in points) if label != BASELINE]
    colours, dashes = colour_map([BASELINE, *labels]), dict(zip(sharded, ("-", "--", ":", "-."), strict=False))
    numel = sum(parameter.numel for parameter in request.model.trainable)
    for label in labels:
        for stage in sharded:
            base, own = points[BASELINE, stage], points[label, stage]
            saved = [(theirs - mine) / numel for (_, mine), (_, theirs) in zip(own, base, strict=True)]
            share = [100 * (1 - mine / theirs) for (mine, _), (theirs, _) in zip(own, base, strict=True)]
            if stage == sharded[0]:
                absolute.plot(ranks, saved, "o", label=label, color=colours[label], markersize=4)
            relative.plot(ranks, share, label=f"{label}, stage {stage}", color=colours[label], linestyle=dashes[stage])
    absolute.plot(ranks, [4 / n for n in ranks], color="#24292f", linewidth=1, label="4 / N")
    for axes, title in ((absolute, "bytes saved a parameter and rank"), (relative, "saved of model states, %")):
        _log_ranks(axes, ranks)
        axes.set_title(title, fontsize=10)
    absolute.legend(frameon=False, fontsize=8)
    absolute.set_yscale("log")
    figure.legend(*relative.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{_title(request)}: optimizer state against AdamW", fontsize=10)
    return figure


def _log_ranks(axes: Any, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(n) for n in ranks])
    axes.set_xlabel("ranks")
    axes.grid(axis="y", alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


__all__ = ["draw_curves", "notes", "to_table"]
