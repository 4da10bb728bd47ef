"""``ds-optim estimate --html``: a page with sliders, whose script adds up what ``ds_optim.memory.grid`` works out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ds_optim.machine.files import write_atomic
from ds_optim.memory.estimate_fit import USABLE
from ds_optim.memory.grid import grid
from ds_optim.memory.side_by_side import EstimateRequest
from ds_optim.report.estimate import notes, title_of
from ds_optim.report.memory_plots import OWNER_COLOURS
from ds_optim.report.plots import colour_map
from ds_optim.report.render import templates

_GIB = 2**30
_GPU = 80
"""GiB of a GPU where nobody says."""
#: By owner of a part of the peak, what it is called and the name of its colour.
_OWNERS = {
    "weights": ("weights", "weights"),
    "states": ("master weights and optimizer state", "state"),
    "gradients": ("gradients", "gradients"),
    "buckets": ("buckets", "buckets"),
    "gathered": ("gathered layers", "gathered layers"),
    "logits": ("logits", "logits"),
    "activations": ("activations", "activations"),
    "step": ("scratch of the step", "scratch of the step"),
}


def write_page(request: EstimateRequest, path: Path) -> list[Path]:
    """Write the page to ``path``, set to what was asked for; its numbers are those of ``estimate_rows``."""
    data = grid(request)
    start = {
        "stage": max(request.stages),
        "ranks": request.ranks[0],
        "momentum": request.momentum_dtypes[0],
        "batch": request.micro_batch,
        "gpu": _GPU if request.gpu_bytes is None else max(1, round(request.gpu_bytes / _GIB)),
    }
    page = {
        "title": title_of(request),
        "seq_len": f"{request.seq_len:,}",
        "notes": [*notes(replace(request, gpu_bytes=None)), f"What fits leaves {1 - USABLE:.0%} of a GPU free."],
        "data": data,
        "colours": colour_map([column["name"] for column in data["columns"]]),
        "owners": {owner: {"label": label, "colour": OWNER_COLOURS[name]} for owner, (label, name) in _OWNERS.items()},
        "start": start,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, templates().get_template("estimate.html.j2").render(page).rstrip("\n") + "\n")
    return [path]
