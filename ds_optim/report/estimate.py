"""What the figures of ``ds-optim estimate`` are, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_fit import RANKS, USABLE
from ds_optim.memory.rank import RankMemory
from ds_optim.memory.side_by_side import BASELINE, EstimateRequest
from ds_optim.report.memory_plots import SavingOverRanks, alike, over_ranks
from ds_optim.report.plots import PAPER_INK, colour_map, new_figure
from ds_optim.report.units import size

_GIB = 2**30


def notes(request: EstimateRequest) -> list[str]:
    """What the figures of the table are, one line each."""
    lines = [
        "GiB of the rank that needs most. Peak: at the fullest moment of backward or of the step, with what there is "
        "then of gradients, buckets, gathered layers, logits and activations. "
        f"Gradients: {'at their most between micro-batches' if request.zero.accumulation > 1 else 'before the step'}. "
        "Scratch of the step: its gradients, exchanged matrices and what an update works with.",
    ]
    if request.model.counted:
        lines.insert(0, f"Counted: {request.model.counted}.")
    if request.zero.bf16_masters:
        lines.append("Master weights are bf16 from stage 1 on; savings are against AdamW with fp32 ones.")
    if request.zero.offload:
        lines.append(
            f"Host memory: masters, state and gradients of the step, with the staging buffers; a node has up to "
            f"{request.node_ranks} ranks. torch may round pinned buffers up to a power of two, which is not counted."
        )
    if request.tensor > 1:
        lines.append(
            f"Of what AutoTP cuts a rank holds 1/{request.tensor}; its matrices come together whole in the step. "
            "Activations are those of the whole model."
        )
    if request.experts > 1:
        lines.append(f"Of the experts a rank holds 1/{request.experts}, which ZeRO cuts among the ranks with the same.")
    passes = request.passes.own
    if passes.moments:
        how = "with" if request.checkpointing else "without"
        whose = ", of the text decoder alone," if request.model.has_towers else ""
        lines.append(
            f"Activations, {size(passes.kept)} for {request.micro_batch} x {request.seq_len} tokens {how} "
            f"checkpointing{whose} are {passes.how}."
        )
        if passes.short:
            lines.append(f"They may be {size(passes.short)} more: what fits has room for that.")
    else:
        lines.append("Activations are left out: a decoder's widths are not known of this model.")
    lines += unused(request)
    if request.gpu_bytes is not None:
        lines.append(f"What fits leaves {1 - USABLE:.0%} of {size(request.gpu_bytes)} free; up to {RANKS[-1]} GPUs.")
    return lines


def unused(request: EstimateRequest) -> list[str]:
    """What a JSON asks for in vain, in a line."""
    if not request.unused:
        return []
    return [
        f"Not counted: {', '.join(request.unused)}. They act on models that call deepspeed.checkpointing; those of "
        "transformers call torch's, which --checkpointing stands for."
    ]


def draw_curves(request: EstimateRequest, out: Path) -> list[Path]:
    """Model states over ranks, a panel a stage, and what is saved over N, the formula in bytes over N drawn on it."""
    import matplotlib

    matplotlib.use("Agg")
    ranks = [max(request.tensor, request.experts)]
    while ranks[-1] < max(64, *request.ranks):
        ranks.append(2 * ranks[-1])
    out.mkdir(parents=True, exist_ok=True)
    held = _held(request, ranks)
    colours = colour_map(list(dict.fromkeys(label for label, _ in held)))
    figures = {"model_states": _states(request, ranks, held, colours), "saving": _saving(request, ranks, held, colours)}
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = out / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written


Held = dict[tuple[str, int], list[RankMemory]]
"""By optimizer and stage, the rank that needs most at each number of ranks; AdamW comes first."""


def title_of(request: EstimateRequest) -> str:
    place = " to NVMe at stage 3" if request.zero.nvme else ""
    offload = f", optimizer offloaded{place}" if request.zero.offload else ""
    return f"{request.model.name}: {request.model.numel:,} parameters, {request.zero.dtype}{offload}"


def _held(request: EstimateRequest, ranks: Sequence[int]) -> Held:
    found: Held = {}
    for stage in request.stages:
        for plan in (request.plan(BASELINE), *request.plans()):
            label = plan.name if plan.momentum_dtype == "float32" else f"{plan.name}, {plan.momentum_dtype}"
            at = request.baseline_at if label == BASELINE else request.at
            if (label, stage) not in found:
                settings = (at(stage, n) for n in ranks)
                found[label, stage] = [estimate(request.held, plan, s, transients=False).largest for s in settings]
    return found


def _states(request: EstimateRequest, ranks: Sequence[int], held: Held, colours: Mapping[str, str]) -> Any:
    stages = request.stages
    figure, panels = new_figure(3.2 * len(stages) + 0.6, 3.6, PAPER_INK, panels=len(stages), sharey=True)
    panels = panels if len(stages) > 1 else [panels]
    everywhere = {
        label: [(n, held[label, stage][i].most_model_states) for stage in stages for i, n in enumerate(ranks)]
        for label in colours
    }
    for axes, stage in zip(panels, stages, strict=True):
        for names in alike(everywhere):
            values = [memory.most_model_states / _GIB for memory in held[names[0], stage]]
            label, colour = " / ".join(names), colours[names[0]]
            axes.plot(ranks, values, label=label, color=colour, linewidth=1.8, marker="o", markersize=3)
        over_ranks(axes, f"ZeRO-{stage}", ranks, PAPER_INK)
        axes.set_yscale("log")
    panels[0].set_ylabel("model states of a rank, GiB")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title_of(request), fontsize=10)
    return figure


def _saving(request: EstimateRequest, ranks: Sequence[int], held: Held, colours: Mapping[str, str]) -> Any:
    sharded = [stage for stage in request.stages if stage > 0] or list(request.stages)
    numel = sum(parameter.numel for parameter in request.model.trainable)
    saved, shares = {}, {}
    for label in [label for label in colours if label != BASELINE]:
        for stage in sharded:
            pairs = list(zip(ranks, held[label, stage], held[BASELINE, stage], strict=True))
            shares[label, stage] = [
                (n, 100 * (1 - own.most_model_states / base.most_model_states)) for n, own, base in pairs
            ]
            if stage == sharded[0]:
                points = [(n, (base.optimizer_state - own.optimizer_state) / numel) for n, own, base in pairs]
                saved[label] = round(points[0][1], 2), points
    title = f"{title_of(request)}: optimizer state against AdamW"
    plot = SavingOverRanks(name="saving", title=title, saved=saved, shares=shares, measured={}, how="estimated")
    figure = plot.figure(colours, PAPER_INK)
    figure.suptitle(title, fontsize=10)
    return figure
