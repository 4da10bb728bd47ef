"""Estimates at every place that the page of an estimate can be set to, as data that the page adds up by itself.

What a layout says of a place (stage, ranks, optimizer, dtype of momentum) is worked out here. What depends on the
number of sequences, and the peak, the page's script computes from it as ``RankMemory`` and ``Passes`` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_fit import USABLE
from ds_optim.memory.estimate_optimizers import takes_momentum_dtype
from ds_optim.memory.passes import Backward, Passes
from ds_optim.memory.rank import RankMemory
from ds_optim.memory.side_by_side import BASELINE, EstimateRequest

#: What the page's script reads of a ``RankMemory``, under its own names, and of its ``Backward``.
FIELDS = {
    "before_step": "gradients",
    **{
        name: name
        for name in (
            *("weights", "accumulating", "master", "optimizer_state", "scalars", "step_gradients", "exchange"),
            *("chunks", "host", "files", "persistent_buckets"),
        )
    },
}
_BACKWARD = {
    field.name: f"backward_{field.name}" if field.name == "gradients" else field.name for field in fields(Backward)
}
_MOST_RANKS = 64


def ranks_of(request: EstimateRequest) -> list[int]:
    """Powers of two up to 64, and what was asked for."""
    least = max(request.tensor, request.experts)
    powers = {least << n for n in range(_MOST_RANKS.bit_length()) if least << n <= max(_MOST_RANKS, *request.ranks)}
    return sorted({*powers, *request.ranks})


def grid(request: EstimateRequest) -> dict[str, Any]:
    """All that the page computes with. Numbers are bytes, whole.

    ``memories``: by "stage/ranks/column/momentum" the rank that needs most, ``fields`` and then those of ``backward``.
    ``passes``: of one, two and three sequences, their moments as (held, made, logits).
    """
    columns = _columns(request)
    ranks = ranks_of(request)
    memories: dict[str, list[float]] = {}
    for stage in request.stages:
        for count in ranks:
            for name, momenta in columns.items():
                for dtype in momenta:
                    settings = request.baseline_at(stage, count) if name == BASELINE else request.at(stage, count)
                    found = estimate(request.held, request.plan(name, dtype), settings).largest
                    memories[f"{stage}/{count}/{name}/{dtype}"] = _numbers(found)
    return {
        "columns": [{"name": name, "momenta": momenta} for name, momenta in columns.items()],
        "stages": list(request.stages),
        "ranks": ranks,
        "momenta": list(DTYPES),
        "fields": [*FIELDS, *_BACKWARD.values()],
        "memories": memories,
        "passes": {str(n): _moments(request.passes.at(n)) for n in (1, 2, 3)} if request.has_passes else None,
        "usable": USABLE,
    }


def _columns(request: EstimateRequest) -> Mapping[str, list[str]]:
    """By optimizer, AdamW first, the dtypes that its momentum may have."""
    names = dict.fromkeys((BASELINE, *request.optimizers))
    return {name: list(DTYPES) if takes_momentum_dtype(name) else ["float32"] for name in names}


def _numbers(memory: RankMemory) -> list[float]:
    own = (getattr(memory, name) for name in FIELDS.values())
    return [*own, *(getattr(memory.backward, name) for name in _BACKWARD)]


def _moments(passes: Passes) -> dict[str, Any]:
    moments = [[moment.held, moment.made, moment.logits] for moment in passes.moments]
    return {"kept": passes.kept, "short": passes.short, "moments": moments}
