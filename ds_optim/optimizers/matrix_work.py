"""How the matrices of a unit are worked on, as data: what travels, what it costs, what is held for it.

A step, the estimate and the simulator plan an exchange from this alone: the same one, where a step counts operations
as they do (``"costs": "modelled"``) and where measured costs put matrices into the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ds_optim.matrix.polar import PolarSpec, scratch_elements
from ds_optim.matrix.shapes import Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.plan import Bucket, ExchangePlan, plan_exchange

_FP32 = 4
_MIB = 1 << 20
#: Elements that a rank sends and receives for each that it owns in a bucket. "each": it receives its own matrices and
#: sends as many. "flat": of its partition the first and the last matrix may be cut, and both be others'.
_MOVED = {"each": 2, "flat": 3, "none": 0}
#: Buckets that an overlapped exchange is cut into where each then holds so many elements: smaller messages cost more
#: in latency than they hide.
_BUCKETS, _LEAST_BUCKET = 4, 1 << 18


@dataclass(frozen=True, kw_only=True)
class MatrixWork:
    """What an exchange is planned from, beside the layout.

    polar: resolved. bucket_mb: MiB that the exchange may hold at once, unless one matrix asks for more. overlap:
    messages fly while matrices are worked on. stacked: equal matrices are worked on as one batch, as on CUDA, not one
    by one, as on a CPU. costs: measured ones, (m, n) -> milliseconds of a matrix; operations are counted where None.
    """

    shape: Shape
    polar: PolarSpec
    bucket_mb: float
    overlap: bool
    stacked: bool
    costs: Mapping[tuple[int, int], float] | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the messages to the owner."""
        return (self.polar.message_dtype, torch.float32) if self.shape.weights else (self.polar.message_dtype,)

    @property
    def there(self) -> int:
        """Bytes of an element on its way to the owner."""
        return sum(dtype.itemsize for dtype in self.dtypes)

    @property
    def back(self) -> int:
        """Bytes of its result."""
        return (self.shape.result or self.polar.message_dtype).itemsize

    def cost(self, view: MatrixView) -> float:
        """Of all matrices of a view; only ratios matter."""
        return sum(count * self._cost(m, n) for count, m, n in view.matrices())

    def _cost(self, m: int, n: int) -> float:
        return self.shape.cost(m, n, self.polar) if self.costs is None else self.costs[m, n]

    def scratch(self, m: int, n: int) -> int:
        """Bytes of temporaries of one matrix."""
        if self.shape.weights:  # fp32: copies of weights and direction, the product and its result; basis and Gram
            return _FP32 * (4 * m * n + 2 * min(m, n) ** 2)
        return scratch_elements(m, n, self.polar) * self.polar.compute_dtype.itemsize

    def held_per_element(self, unit: Unit, views: Collection[MatrixView]) -> float:
        """The most bytes that an exchange holds for each element that a rank owns in a bucket: the c in
        max(bucket, c x largest matrix).

        That is a bucket in work (messages, stacks, results, temporaries), with overlap also the next one on its way
        in and the last one on its way out.
        """
        arriving = (_MOVED[unit.cut] + 1) * self.there
        working = self.back + max(self._temporaries_per_element(view) for view in views)
        around = arriving + _MOVED[unit.cut] * self.back if self.overlap and unit.cut != "none" else 0
        return arriving + working + around

    def _temporaries_per_element(self, view: MatrixView) -> float:
        each = max(self.scratch(m, n) / (m * n) for _, m, n in view.matrices())
        return each + self._copied(view)

    def _copied(self, view: MatrixView) -> int:
        """Bytes an element of the copies that take matrices out of a parameter and put results back into one."""
        if not is_cut_up(view):
            return 0
        return self.there + (self.back if self.shape.result is not None else 0)

    def plan(self, unit: Unit, views: Mapping[int, MatrixView]) -> ExchangePlan:
        """The exchange of the unit's matrices, which holds at most max(bucket, c x largest matrix) bytes (at stage 3
        c more for each parameter, of which a rank holds an N-th, rounded up).

        With overlap it has some buckets even where one could hold all: nothing can be worked on while the first one
        flies in, nor while the last one flies out.
        """
        most = max(1, int(self.bucket_mb * _MIB / self.held_per_element(unit, set(views.values()))))
        bucket = most
        if self.overlap:
            cut = sum(unit.params[param].numel for param in views if len(unit.holders(param)) > 1)
            bucket = min(most, max(_LEAST_BUCKET, -(-cut // (_BUCKETS * unit.world_size))))
        return plan_exchange(unit, views, cost=self.cost, bucket_elements=bucket, batch_elements=most)

    def peak_scratch(self, plan: ExchangePlan, rank: int) -> int:
        """The most bytes that a rank holds at once in an exchange: messages, stacks, results, and matrices in work."""
        owned = [sum(plan.unit.params[p].numel for p in bucket.owned[rank]) for bucket in plan.buckets]
        flying = [_flying(plan, bucket, rank) for bucket in plan.buckets]
        arriving = [(moving + own) * self.there for moving, own in zip(flying, owned, strict=True)]
        leaving = [moving * self.back for moving in flying]
        most = 0
        for batch in plan.whole[rank]:
            held = sum(plan.unit.params[p].numel for p in batch) * (self.there + self.back)
            most = max(most, held + self._temporaries(plan, batch) + (arriving[0] if arriving else 0))
        for number, bucket in enumerate(plan.buckets):
            held = arriving[number] + owned[number] * self.back + self._temporaries(plan, bucket.owned[rank])
            if self.overlap:
                held += sum(arriving[number + 1 : number + 2]) + (leaving[number - 1] if number else 0)
            most = max(most, held)
        return most

    def _temporaries(self, plan: ExchangePlan, params: Sequence[int]) -> int:
        """Bytes of the costliest run of equal matrices."""
        most = 0
        for view, run in groupby(params, key=lambda param: plan.views[param]):
            equal = len(list(run))
            for count, m, n in view.matrices():
                held = (count * equal if self.stacked else 1) * self.scratch(m, n)
                most = max(most, held + equal * view.numel * self._copied(view))
        return most


def is_cut_up(view: MatrixView) -> bool:
    """Whether a parameter's matrices are taken out of it by a copy; heads and experts that stack up need none."""
    return view.transpose or len(view.matrices()) > 1


def _flying(plan: ExchangePlan, bucket: Bucket, rank: int) -> int:
    """Elements that a rank sends and receives for a bucket."""
    return sum(plan.sent_counts(bucket, rank)) + sum(plan.received_counts(bucket, rank))
