"""The matrix work of one unit: an exchange, and what its owners do with the matrices they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers.matrix_work import MatrixWork, is_cut_up
from ds_optim.optimizers.rules import SCALES
from ds_optim.sharding.binding import Member
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Apply, Exchange, Fill
from ds_optim.sharding.layout import Slice, Unit


class MatrixWorker:
    """Gives the matrices of one unit their shape, each on its owner.

    Args:
        members: the unit's parameters, each with a view.
        work: what the rule makes of its directions, and how.
        device: where matrices are worked on and messages live.
    """

    def __init__(
        self,
        unit: Unit,
        members: Sequence[Member],
        comm: Comm,
        *,
        work: MatrixWork,
        device: torch.device,
    ) -> None:
        self.work = work
        self._views = views_of(members)
        self.plan = work.plan(unit, self._views)
        self._exchange = Exchange(
            self.plan, comm, device=device, dtypes=work.dtypes, result=work.shape.result, overlap=work.overlap
        )

    def digest(self) -> str:
        """A hash of all that the ranks must agree on."""
        return f"{self.plan.digest()} {self.work.shape.name} {self.work.polar}"

    def sent_bytes(self, rank: int) -> int:
        """Bytes that ``rank`` sends in one exchange: its slices out, and its results back."""
        return self.plan.slices_sent(rank) * self.work.there + self.plan.results_sent(rank) * self.work.back

    def matrices_of(self, param: int) -> int:
        """How many matrices a parameter is."""
        return sum(count for count, _, _ in self._views[param].matrices())

    def scale(self, param: int, name: str | None) -> float:
        """The scale of a parameter's first matrix; :meth:`run` puts the others in proportion to it."""
        if name is None:
            return 1.0
        _, rows, columns = self._views[param].matrices()[0]
        return SCALES[name](rows, columns)

    def run(self, fill: Fill, apply: Apply, scale: str | None, absent: frozenset[int]) -> None:
        """Hand the shape of what ``fill`` writes to ``apply``, for every matrix of the unit."""
        self._exchange.run(fill, lambda view, stacks: self._solve(view, stacks, scale), apply, absent)

    def flags(self, fill: Fill, test: Callable[[Tensor], Tensor], absent: frozenset[int]) -> dict[int, bool]:
        """By parameter, for those of which this rank holds a slice, whether all its matrices pass ``test``.

        test: (B, m, n) -> (B,) of bool. The owner's answer travels back as a result does.
        """
        found: dict[int, bool] = {}

        def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Tensor:
            answers = [all(bool(test(block).all()) for block in view.unpack(row)) for row in stacks[0]]
            result = torch.empty(stacks[0].shape, dtype=self._exchange.result, device=stacks[0].device)
            for row, answer in zip(result, answers, strict=True):
                row.fill_(float(answer))
            return result

        def keep(piece: Slice, result: Tensor) -> None:
            found[piece.param] = bool(result[0])

        self._exchange.run(fill, solve, keep, absent)
        return found

    def _solve(self, view: MatrixView, stacks: Sequence[Tensor], scale: str | None) -> Tensor:
        """(B, numel) parameters of one view -> (B, numel) results, in proportion to the first matrix's scale."""
        blocks = view.matrices()
        directions, weights = stacks[0], stacks[1] if self.work.shape.weights else None
        if not is_cut_up(view):  # whole parameters, or stacks of heads or experts
            count, m, n = blocks[0]
            seen = None if weights is None else weights.view(-1, m, n)
            return self.work.shape.solve(directions.view(-1, m, n), seen, self.work.polar).view(directions.shape)
        first = self._relative(scale, blocks[0])
        unpacked = [view.unpack(row) for row in directions]
        beside = None if weights is None else [view.unpack(row) for row in weights]
        results: list[list[Tensor]] = [[] for _ in unpacked]
        for number, (count, m, n) in enumerate(blocks):
            seen = None if beside is None else torch.cat([row[number] for row in beside])
            result = self.work.shape.solve(torch.cat([row[number] for row in unpacked]), seen, self.work.polar)
            relative = self._relative(scale, (count, m, n)) / first
            if relative != 1.0:  # matrices of unlike shape in one parameter, as in a grouped-query QKV
                for matrix in result:
                    matrix.copy_(matrix.float().mul_(relative))
            for pieces, piece in zip(results, result.split(count), strict=True):
                pieces.append(piece)
        out = directions
        if directions.dtype != self._exchange.result:
            out = torch.empty(directions.shape, dtype=self._exchange.result, device=directions.device)
        for row, pieces in zip(out, results, strict=True):
            view.pack_into(pieces, row)
        return out

    @staticmethod
    def _relative(scale: str | None, block: tuple[int, int, int]) -> float:
        return 1.0 if scale is None else SCALES[scale](*block[1:])


def views_of(members: Sequence[Member]) -> dict[int, MatrixView]:
    """How each of a unit's parameters is seen as matrices, by its number."""
    views = {}
    for number, member in enumerate(members):
        assert member.view is not None, f"{member.spec.name} takes a matrix rule and has no view"
        views[number] = member.view
    return views
