"""The scratch of an exchange of matrices, from its plan: what is alive at once in ``ds_optim.sharding.exchange``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ds_optim.matrix.polar import PolarSpec, scratch_elements
from ds_optim.matrix.shapes import Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate_optimizers import OptimizerPlan
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.plan import Bucket, ExchangePlan, plan_exchange

_FP32 = 4
_MIB = 1 << 20
#: Ranks whose exchange is worked out; of more, so many spread evenly, as neighbours do alike.
_SAMPLED_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class MatrixWork:
    """How the matrices of a unit are worked on.

    polar: resolved. stacked: equal matrices are worked on as one batch, as on CUDA, not one by one, as on a CPU.
    """

    shape: Shape
    polar: PolarSpec
    bucket_mb: float
    overlap: bool
    stacked: bool

    @property
    def there(self) -> int:
        """Bytes of an element on its way to the owner."""
        return self.polar.message_dtype.itemsize + (_FP32 if self.shape.weights else 0)

    @property
    def back(self) -> int:
        """Bytes of its result."""
        return (self.shape.result or self.polar.message_dtype).itemsize

    def cost(self, view: MatrixView) -> float:
        return sum(count * self.shape.cost(m, n, self.polar) for count, m, n in view.matrices())

    def scratch(self, m: int, n: int) -> int:
        """Bytes of temporaries of one matrix."""
        if self.shape.weights:  # fp32: copies of weights and direction, the product and its result; basis and Gram
            return _FP32 * (4 * m * n + 2 * min(m, n) ** 2)
        return scratch_elements(m, n, self.polar) * self.polar.compute_dtype.itemsize


def exchange_scratch(unit: Unit, views: Mapping[int, MatrixView], work: MatrixWork) -> Mapping[int, int]:
    """By rank, the most bytes that an exchange of the unit's matrices holds at once, its matrix work included.

    That is the bucket in work (messages, stacks, results, scratch), the next one on its way in and the last one on
    its way out; or matrices that lie whole while the first bucket flies.
    """
    plan = plan_exchange(unit, views, cost=work.cost, bucket_elements=max(1, int(work.bucket_mb * _MIB) // work.there))
    every = max(1, -(-unit.world_size // _SAMPLED_RANKS))
    return {rank: peak_scratch(plan, rank, work) for rank in range(0, unit.world_size, every)}


def work_of(shape: Shape, optimizer: OptimizerPlan, zero: ZeroSettings) -> MatrixWork:
    """How an optimizer's matrices are worked on under these settings."""
    return MatrixWork(
        shape=shape,
        polar=optimizer.polar,
        bucket_mb=optimizer.bucket_mb,
        overlap=optimizer.overlap,
        stacked=zero.device != "cpu",
    )


def peak_scratch(plan: ExchangePlan, rank: int, work: MatrixWork) -> int:
    """The most bytes that a rank holds at once in an exchange: messages, stacks, results, and matrices in work."""
    owned = [sum(plan.unit.params[p].numel for p in bucket.owned[rank]) for bucket in plan.buckets]
    flying = [_flying(plan, bucket, rank) for bucket in plan.buckets]
    arriving = [(moving + own) * work.there for moving, own in zip(flying, owned, strict=True)]
    leaving = [moving * work.back for moving in flying]
    most = 0
    for batch in plan.whole[rank]:
        held = sum(plan.unit.params[p].numel for p in batch) * (work.there + work.back)
        most = max(most, held + _temporaries(plan, batch, work) + (arriving[0] if arriving else 0))
    for number, bucket in enumerate(plan.buckets):
        held = arriving[number] + owned[number] * work.back + _temporaries(plan, bucket.owned[rank], work)
        if work.overlap:
            held += sum(arriving[number + 1 : number + 2]) + (leaving[number - 1] if number else 0)
        most = max(most, held)
    return most


def _flying(plan: ExchangePlan, bucket: Bucket, rank: int) -> int:
    """Elements that a rank sends and receives for a bucket."""
    return sum(plan.sent_counts(bucket, rank)) + sum(plan.received_counts(bucket, rank))


def _temporaries(plan: ExchangePlan, params: Sequence[int], work: MatrixWork) -> int:
    """Bytes of the costliest run of equal matrices."""
    most = 0
    for view, run in groupby(params, key=lambda param: plan.views[param]):
        equal = len(list(run))
        for count, m, n in view.matrices():
            most = max(most, (count * equal if work.stacked else 1) * work.scratch(m, n))
    return most
