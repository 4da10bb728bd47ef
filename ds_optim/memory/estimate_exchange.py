"""The scratch of an exchange of matrices, from its plan: what is alive at once in ``ds_optim.sharding.exchange``."""

from __future__ import annotations

from collections.abc import Mapping

from ds_optim.matrix.shapes import Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate_optimizers import OptimizerPlan
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.optimizers.matrix_work import MatrixWork
from ds_optim.sharding.layout import Unit

#: Ranks whose exchange is worked out; of more, so many spread evenly, as neighbours do alike.
_SAMPLED_RANKS = 64


def exchange_scratch(unit: Unit, views: Mapping[int, MatrixView], work: MatrixWork) -> Mapping[int, int]:
    """By rank, the most bytes that an exchange of the unit's matrices holds at once, its matrix work included."""
    plan = work.plan(unit, views)
    every = max(1, -(-unit.world_size // _SAMPLED_RANKS))
    return {rank: work.peak_scratch(plan, rank) for rank in range(0, unit.world_size, every)}


def work_of(shape: Shape, optimizer: OptimizerPlan, zero: ZeroSettings) -> MatrixWork:
    """How an optimizer's matrices are worked on under these settings; operations are counted, nothing is measured."""
    return MatrixWork(
        shape=shape,
        polar=optimizer.polar,
        bucket_mb=optimizer.bucket_mb,
        overlap=optimizer.overlap,
        stacked=zero.device != "cpu",
    )
