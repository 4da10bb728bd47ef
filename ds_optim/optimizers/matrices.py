"""The matrix work of one unit: an exchange, and what its owners do with the matrices they get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_optim.matrix.polar import PolarSpec, cost, polar
from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers.rules import SCALES
from ds_optim.sharding.binding import Member
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Apply, Exchange, Fill
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.plan import plan_exchange

_MIB = 1 << 20


class MatrixWorker:
    """Orthogonalizes the matrices of one unit, each on its owner.

    Args:
        members: the unit's parameters, each with a view.
        polar: resolved for the hardware.
        device: where matrices are worked on and messages live.
        bucket_mb: MiB of matrices that a rank owns in one bucket.
        overlap: messages fly while matrices are worked on.
    """

    def __init__(
        self,
        unit: Unit,
        members: Sequence[Member],
        comm: Comm,
        *,
        polar: PolarSpec,
        device: torch.device,
        bucket_mb: float,
        overlap: bool,
    ) -> None:
        self._polar = polar
        self._views: dict[int, MatrixView] = {}
        for number, member in enumerate(members):
            assert member.view is not None, f"{member.spec.name} takes a matrix rule and has no view"
            self._views[number] = member.view
        self.plan = plan_exchange(
            unit,
            self._views,
            cost=self._cost,
            bucket_elements=max(1, int(bucket_mb * _MIB) // polar.message_dtype.itemsize),
        )
        self._exchange = Exchange(self.plan, comm, device=device, dtype=polar.message_dtype, overlap=overlap)

    def digest(self) -> str:
        """A hash of all that the ranks must agree on."""
        return f"{self.plan.digest()} {self._polar}"

    def scale(self, param: int, name: str) -> float:
        """The scale of a parameter's first matrix; :meth:`run` puts the others in proportion to it."""
        _, rows, columns = self._views[param].matrices()[0]
        return SCALES[name](rows, columns)

    def run(self, fill: Fill, apply: Apply, scale: str, absent: frozenset[int]) -> None:
        """Hand the polar factor of what ``fill`` writes to ``apply``, for every matrix of the unit."""
        self._exchange.run(fill, lambda view, stack: self._solve(view, stack, scale), apply, absent)

    def _cost(self, view: MatrixView) -> float:
        return sum(count * cost(m, n, self._polar) for count, m, n in view.matrices())

    def _solve(self, view: MatrixView, stack: Tensor, scale: str) -> Tensor:
        """(B, numel) parameters of one view -> (B, numel) polar factors of their matrices."""
        blocks = view.matrices()
        if len(blocks) == 1 and not view.transpose:  # whole parameters, or stacks of heads or experts: nothing to cut
            count, m, n = blocks[0]
            return polar(stack.view(-1, m, n), self._polar).view(stack.shape)
        first = SCALES[scale](*blocks[0][1:])
        unpacked = [view.unpack(row) for row in stack]
        results: list[list[Tensor]] = [[] for _ in unpacked]
        for number, (count, m, n) in enumerate(blocks):
            factor = polar(torch.cat([row[number] for row in unpacked]), self._polar)
            relative = SCALES[scale](m, n) / first
            if relative != 1.0:  # matrices of unlike shape in one parameter, as in a grouped-query QKV
                factor = (factor.float() * relative).to(factor.dtype)
            for result, piece in zip(results, factor.split(count), strict=True):
                result.append(piece)
        for row, pieces in zip(stack, results, strict=True):
            view.pack_into(pieces, row)
        return stack
