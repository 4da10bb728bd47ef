"""An exchange of whole matrices and of some that ranks share: shares go to their owners, who work on them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_optim.matrix.shapes import Part
from ds_optim.matrix.shared import polar_of_rows
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange, Place
from ds_optim.sharding.lines import Lines
from ds_optim.sharding.shards import Solve
from ds_optim.sharding.shares import SharedPlan, ShareView


class SharedExchange(Exchange):
    """Runs one :class:`SharedPlan` on one rank; who calls it sees slices of parameters, a share's apart.

    A rank's messages to its teams stand in the same order among those to all ranks as on the others of each team
    (teams.py): in a bucket, and from bucket to bucket.

    Args:
        teams: by size, the ranks of this one's team.
    """

    def __init__(
        self, plan: SharedPlan, comm: Comm, device: torch.device, home: torch.device, teams: Mapping[int, Comm]
    ) -> None:
        self.teams = teams
        self._origin, self._unit = plan.origin, plan.of.unit
        super().__init__(plan, comm, device, home=home)

    def _in_messages(self, places: Sequence[Place], parts: Sequence[Part]) -> Lines:
        return self._of_parameters(super()._in_messages(places, parts))

    def _in_stacks(self, run: Sequence[int], parts: Sequence[Part]) -> Lines:
        return self._of_parameters(super()._in_stacks(run, parts))

    def _of_parameters(self, lines: Lines) -> Lines:
        """The same, as slices of parameters."""
        slices = []
        for held in lines.slices:
            param, first = self._origin.get(held.param, (held.param, 0))
            slices.append(replace(held, param=param, start=first + held.start))
        return lines.seen_as(self._unit, slices)

    def _solved(self, solve: Solve, view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
        if not isinstance(view, ShareView):
            return super()._solved(solve, view, stacks)
        plan, (m, n) = self.plan, view.sides
        assert plan.shape.of_factor is not None
        out = torch.empty(stacks[0].shape, dtype=plan.back[0].dtype, device=self.device)
        for result, rows in zip(out, stacks[0], strict=True):
            factor = polar_of_rows(rows.view(-1, n), m, plan.polar, self.teams[view.ranks])
            result.copy_(plan.shape.of_factor(factor).view(-1))
        return [out]


def teams_of(comm: Comm, plans: Iterable[SharedPlan]) -> dict[int, Comm]:
    """By size, this rank's team of each size that the plans have. Collective; alike on all ranks."""
    sizes = {share.team.size for plan in plans for share in plan.shares}
    return {size: comm.neighbours(size) for size in sorted(sizes, reverse=True)}
