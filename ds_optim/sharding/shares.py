"""The plan of an exchange in which the ranks of a node share its largest matrices (teams.py, matrix/shared.py).

A share is a run of a parameter's rows, and is planned, sent and held as a parameter of its own, whose owner is one rank
of the team. Shares are numbered behind the parameters; what an exchange's caller is told of is the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

from ds_optim.errors import UserError
from ds_optim.matrix import shared
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import ParamSpec, Slice, Unit
from ds_optim.sharding.owners import makespan_ratio
from ds_optim.sharding.plan import Bucket, ExchangePlan
from ds_optim.sharding.teams import Job, Team, assign_teams, deal_teams, sizes_of
from ds_optim.sharding.working import Working


@dataclass(frozen=True, kw_only=True)
class ShareView(MatrixView):
    """Rows of a matrix ``whole``, (m, n), that so many ``ranks`` share."""

    whole: MatrixView
    ranks: int

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n) of the whole matrix."""
        ((_, m, n),) = self.whole.matrices()
        return m, n


@dataclass(frozen=True)
class Share:
    """Elements [start, start + numel) of parameter number ``param``, which ``team`` shares, on ``owner``; ``most``: of
    the largest share of it."""

    param: int
    start: int
    numel: int
    most: int
    team: Team
    owner: int


@dataclass(frozen=True, kw_only=True)
class _SharedUnit(Unit):
    """A unit with the shares as further parameters, each of which lies where its elements of the parameter do."""

    of: Unit
    shares: tuple[Share, ...]

    def slice_of(self, param: int, rank: int) -> Slice | None:
        if param < len(self.of.params):
            return self.of.slice_of(param, rank)
        share = self.shares[param - len(self.of.params)]
        held = self.of.slice_of(share.param, rank)
        if held is None:
            return None
        first = max(held.start, share.start)
        numel = min(held.start + held.numel, share.start + share.numel) - first
        offset = held.offset + first - held.start
        return Slice(param, first - share.start, numel, held.tensor, offset) if numel > 0 else None

    def holders(self, param: int) -> list[tuple[int, Slice]]:
        if param < len(self.of.params):
            return self.of.holders(param)
        ranks = (rank for rank, _ in self.of.holders(self.shares[param - len(self.of.params)].param))
        return [(rank, held) for rank in ranks if (held := self.slice_of(param, rank)) is not None]


@dataclass(frozen=True, kw_only=True)
class SharedPlan(ExchangePlan):
    """A plan some of whose parameters are shared. ``owners``: of the others that travel."""

    of: ExchangePlan
    shares: tuple[Share, ...]
    owners: Mapping[int, int]

    @property
    def of_whole(self) -> ExchangePlan:
        return self.of

    @property
    def shared(self) -> int:
        return len({share.param for share in self.shares})

    def share(self, job: int) -> Share | None:
        """The share of that number; None for a parameter that stays whole."""
        first = len(self.of.unit.params)
        return None if job < first else self.shares[job - first]

    @cached_property
    def origin(self) -> dict[int, tuple[int, int]]:
        """By number of a share, the parameter's, and the share's first element in it."""
        first = len(self.of.unit.params)
        return {first + number: (share.param, share.start) for number, share in enumerate(self.shares)}

    @cached_property
    def costs(self) -> dict[int, float]:
        of_shares = {job: _cost(self.of, param, self._size(job)) for job, (param, _) in self.origin.items()}
        return {**self.of.costs, **of_shares}

    def _size(self, job: int) -> int:
        share = self.share(job)
        return 1 if share is None else share.team.size

    @cached_property
    def cut(self) -> tuple[int, ...]:
        apart = {share.param for share in self.shares}
        return *(param for param in self.of.cut if param not in apart), *self.origin

    @cached_property
    def _whole(self) -> list[list[int]]:
        return self.of._whole

    def _owners(self) -> list[int]:
        return [self.owners[job] if (share := self.share(job)) is None else share.owner for job in self.cut]

    def _turn(self, param: int) -> tuple[object, ...]:
        """The largest teams' first, and alike on all of a team: by the parameter, not by the share."""
        matrix, _ = self.origin.get(param, (param, 0))
        return -self._size(param), -self.costs[param], repr(self.of.views[matrix]), matrix

    def _room(self, param: int) -> int:
        """Alike on all of a team, which so have a matrix in the same bucket."""
        share = self.share(param)
        return super()._room(param) if share is None else share.most

    @cached_property
    def makespan(self) -> float:
        whole = self.of
        return max(self.loads) / max(whole.loads) * makespan_ratio(whole.loads, [whole.costs[p] for p in whole.cut])

    def bytes_by_peer(self, bucket: Bucket, rank: int) -> list[int]:
        """What goes to owners and back; and what a team's ranks send each other, as if it went to all of them alike."""
        found = super().bytes_by_peer(bucket, rank)
        for job in bucket.owned[rank]:
            share, view = self.share(job), self.views[job]
            if share is None:
                continue
            assert isinstance(view, ShareView)
            team = share.team
            sent = shared.sent_bytes(*view.sides, self.polar, team.size, rank - team.first)
            others = [peer for peer in team.ranks if peer != rank]
            for place, peer in enumerate(others):  # what is left over goes to the first ones
                found[peer] += sent // len(others) + (place < sent % len(others))
        return found

    @cached_property
    def working(self) -> Working:
        return _SharedWorking(shape=self.shape, polar=self.polar, stacked=self.stacked)

    @cached_property
    def held_per_element(self) -> float:
        """Of what is held: shared parameters are not."""
        apart = {share.param for share in self.shares}
        return max(map(self._per_element, {view for param, view in self.views.items() if param not in apart}))


class _SharedWorking(Working):
    def held_by(self, view: MatrixView, equal: int) -> int:
        """Shares are worked on one by one."""
        if not isinstance(view, ShareView):
            return super().held_by(view, equal)
        results = sum(equal * view.numel * part.dtype.itemsize for part in self.back)
        return results + self.scratch(view, *view.sides)

    def scratch(self, view: MatrixView, m: int, n: int) -> int:
        if isinstance(view, ShareView):
            return shared.scratch_bytes(*view.sides, self.polar, view.ranks)
        return super().scratch(view, m, n)


def shared_plan(plan: ExchangePlan, sizes: Sequence[int], *, always: bool = False) -> ExchangePlan:
    """The plan with teams of these sizes; itself where they would not pay.

    always: whatever can be shared is, by as many ranks as the last of ``sizes`` says, whether it pays or not.
    """
    jobs = [_job(plan, param, sizes[-1:] if always else sizes) for param in plan.cut]
    loads = [sum(plan.costs[p] for p in params) for params in plan._whole]
    near = [_nearest(plan.unit, param) for param in plan.cut]
    teams = deal_teams(jobs, loads) if always else assign_teams(jobs, loads, near, max(plan.loads))
    if teams is None or all(team.size == 1 for team in teams):
        return plan
    by_param = dict(zip(plan.cut, teams, strict=True))
    shares = tuple(share for param, team in by_param.items() if team.size > 1 for share in _shares(plan, param, team))
    views = {len(plan.unit.params) + number: _view(plan, share) for number, share in enumerate(shares)}
    specs = [
        ParamSpec(name=f"{plan.unit.params[share.param].name}, rows of rank {share.owner}", shape=view.shape)
        for share, view in zip(shares, views.values(), strict=True)
    ]
    own = {field.name: getattr(plan.unit, field.name) for field in fields(Unit)}
    unit = _SharedUnit(**{**own, "params": (*plan.unit.params, *specs)}, of=plan.unit, shares=shares)
    own = {field.name: getattr(plan, field.name) for field in fields(ExchangePlan)}
    owners = {param: team.first for param, team in by_param.items() if team.size == 1}
    return SharedPlan(**{**own, "unit": unit, "views": {**plan.views, **views}}, of=plan, shares=shares, owners=owners)


def shared_by(plan: ExchangePlan, share: bool | str | int, ranks_per_node: int) -> ExchangePlan:
    """The plan as the JSON's ``share`` wants it: false, "auto" or how many ranks share each matrix that can be."""
    ranks = plan.unit.world_size
    if share is False or not plan.cut:
        return plan
    if share == "auto":  # gloo's messages would cost more than they save
        return shared_plan(plan, sizes_of(ranks, ranks_per_node)) if plan.stacked else plan
    assert isinstance(share, int)
    if ranks % share:
        raise UserError(f"exchange.share is {share}, and {ranks} ranks are no multiple of it: write a divisor")
    return shared_plan(plan, (share,), always=True)


def can_be_shared(plan: ExchangePlan, view: MatrixView) -> bool:
    """Whether a parameter is one matrix, stored as it is, of which the rule takes the polar factor and no more."""
    plain = type(view) is MatrixView and not view.is_cut_up and view.of is None and view.matrices()[0][0] == 1
    return plain and plan.fraction == 1.0 and plan.shape.of_factor is not None and plan.polar.method != "svd"


def _job(plan: ExchangePlan, param: int, sizes: Sequence[int]) -> Job:
    """What a parameter costs each rank of teams of these sizes, of those that it can have; whole, where of none."""
    view = plan.views[param]
    fits = [size for size in sizes if size == 1 or (can_be_shared(plan, view) and size <= min(*view.matrices()[0][1:]))]
    return {size: _cost(plan, param, size) for size in fits or [1]}


def _cost(plan: ExchangePlan, param: int, size: int) -> float:
    """In the plan's unit: of measured costs as many times as much as is counted."""
    whole = plan.costs[param]
    if size == 1:
        return whole
    _, m, n = plan.views[param].matrices()[0]
    return whole * shared.cost(m, n, plan.polar, size) / plan.shape.cost(m, n, plan.polar)


def _nearest(unit: Unit, param: int) -> list[int]:
    """The ranks with a parameter, those with most of it first; none where all have as much."""
    held = unit.holders(param) if unit.cut == "flat" else []
    return [rank for rank, _ in sorted(held, key=lambda pair: (-pair[1].numel, pair[0]))]


def _shares(plan: ExchangePlan, param: int, team: Team) -> Iterator[Share]:
    """Of the ranks of a team, in their order."""
    _, m, n = plan.views[param].matrices()[0]
    most = -(-m // team.size) * n
    for owner, (first, last) in zip(team.ranks, pairwise(shared.bounds(m, team.size)), strict=True):
        yield Share(param, first * n, (last - first) * n, most, team, owner)


def _view(plan: ExchangePlan, share: Share) -> ShareView:
    whole = plan.views[share.param]
    _, _, n = whole.matrices()[0]
    return ShareView(shape=(share.numel // n, n), whole=whole, ranks=share.team.size)
