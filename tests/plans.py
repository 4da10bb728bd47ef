"""Plans of exchanges with costs and bounds that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR, Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.plan import ExchangePlan

MIB = 1 << 20


def views_of(unit: Unit, transpose: bool = False) -> Mapping[int, MatrixView]:
    """Each parameter as one matrix, with ``transpose`` every other one turned."""
    return {
        param: MatrixView(shape=spec.shape, transpose=transpose and param % 2 == 0)
        for param, spec in enumerate(unit.params)
    }


def plan_exchange(
    unit: Unit,
    views: Mapping[int, MatrixView] | None = None,
    *,
    bucket_elements: int,
    cost: Callable[[int, int], float] = lambda m, n: float(m * n),
    shape: Shape = POLAR,
    dtype: torch.dtype = torch.float32,
    overlap: bool = False,
) -> ExchangePlan:
    """A plan whose buckets and batches hold so many elements, and whose directions travel in ``dtype``."""
    plan = ExchangePlan(
        unit=unit,
        views=views if views is not None else views_of(unit),
        shape=replace(shape, cost=lambda m, n, _: cost(m, n)),
        polar=PolarSpec(dtype=str(dtype).removeprefix("torch."), method="standard", gram_from=2.0),
        bucket_mb=1.0,
        overlap=overlap,
        stacked=False,
    )
    return replace(plan, bucket_mb=(bucket_elements + 0.5) * plan.held_per_element / MIB)
