"""Some rows of each matrix, chosen by what all ranks together hold of them: which they are, and where they lie.

As the chosen rows stand in a parameter one behind the other, those in a rank's slice are a run of the smaller parameter
that they make. So they are exchanged as a unit of such parameters, by the owners and in the buckets of the whole plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from ds_optim.elementwise import fused
from ds_optim.elementwise.chosen import Rows
from ds_optim.matrix.views import MatrixView, selected_rows
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import ParamSpec, Slice, Unit
from ds_optim.sharding.plan import Bucket, ExchangePlan

#: Elements that are added up in fp64 at a time, by kind of device: on CUDA as few launches as 32 MiB of scratch allow.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}


@dataclass(frozen=True)
class Chosen:
    """Rows of a parameter's matrices. flags: of each row, counted as in ``view.of_rows``; sums: how many before it,
    from any number on, in the host's memory; before: the same where the flags are, for kernels."""

    view: MatrixView
    flags: Tensor
    sums: Tensor
    before: Tensor | None = None

    def mask(self, held: Slice) -> Tensor:
        """Of each element of a slice, (n,), whether its row is chosen."""
        return self.view.spread(self.flags, held.start, held.numel)

    def run(self, held: Slice) -> tuple[int, int]:
        """A slice's elements of chosen rows, first and last + 1, counted through all of the parameter's."""
        return self._before(held.start), self._before(held.start + held.numel)

    def _before(self, element: int) -> int:
        columns, rows, none = self.view.columns, self.view.rows, self._none
        if element == self.view.numel:
            return (int(self.sums[-1]) - none) * columns
        if not self.view.transpose:
            row, column = divmod(element, columns)
            first, last = self.sums[row : row + 2].tolist()
            return int((first - none) * columns + column * (last - first))
        stack, rest = divmod(element, columns * rows)
        line, row = divmod(rest, rows)
        begin, here, end = (int(self.sums[stack * rows + at]) for at in (0, row, rows))
        return (begin - none) * columns + line * (end - begin) + here - begin

    @cached_property
    def _none(self) -> int:
        return int(self.sums[0])

    def rows(self, part: Slice, run: Slice) -> Rows:
        """How a part of a slice lies in rows, for kernels; run: the elements of the slice's chosen rows."""
        offset = run.start + self._none * self.view.columns
        return replace(rows_of(self.view, part.start), flags=self.flags, before=self.before, offset=offset)


@dataclass(frozen=True, kw_only=True)
class _ChosenUnit(Unit):
    """The chosen rows as parameters: each holder of one holds a run of it, which may be empty."""

    whole: Unit
    chosen: Mapping[int, Chosen]

    def slice_of(self, param: int, rank: int) -> Slice | None:
        held = self.whole.slice_of(param, rank)
        if held is None:
            return None
        first, last = self.chosen[param].run(held)
        return Slice(param, first, last - first, held.tensor, 0)


@dataclass(frozen=True, kw_only=True)
class _ChosenPlan(ExchangePlan):
    """What is left of a plan: the same owners and buckets, of smaller matrices."""

    of: ExchangePlan
    even = False

    @cached_property
    def whole(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return self.of.whole

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.of.buckets


def chosen_of(exchange: Exchange, chosen: Mapping[int, Chosen]) -> Exchange:
    """The exchange of chosen rows: of the matrices that travel, and of those that lie whole on this rank."""
    plan = exchange.plan
    views = {param: view.selected(plan.fraction) for param, view in plan.views.items()}
    specs = tuple(
        ParamSpec(name=spec.name, shape=views[param].shape if param in views else spec.shape)
        for param, spec in enumerate(plan.unit.params)
    )
    shared = {field.name: getattr(plan.unit, field.name) for field in fields(Unit)}
    unit = _ChosenUnit(**{**shared, "params": specs}, whole=plan.unit, chosen=chosen)
    shared = {field.name: getattr(plan, field.name) for field in fields(ExchangePlan)}
    smaller = _ChosenPlan(**{**shared, "unit": unit, "views": views, "fraction": 1.0}, of=plan)
    return Exchange(smaller, exchange.comm, exchange.device, home=exchange.home)


class Sums:
    """Sums of the magnitudes in each row of matrices, as far as this rank holds them, on ``device``: 0 at first.

    ``of``: by parameter, of those that travel or lie whole here, (rows,) in fp64. All are in one tensor, ``joined``,
    those that travel first, and equal parameters side by side.
    """

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        plan = exchange.plan
        here = [param for batch in plan.whole[exchange.comm.rank] for param in batch]
        self.runs = [*_alike(plan.views, plan.cut), *_alike(plan.views, here)]
        params = [param for run in self.runs for param in run]
        sizes = [plan.views[param].of_rows.numel for param in params]
        self.joined = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.of = dict(zip(params, self.joined.split(sizes), strict=True)) if params else {}
        self.travelling = sum(size for param, size in zip(params, sizes, strict=True) if param in set(plan.cut))


def _alike(views: Mapping[int, MatrixView], params: Iterable[int]) -> list[list[int]]:
    """Parameters of one view together."""
    found: dict[MatrixView, list[int]] = {}
    for param in params:
        found.setdefault(views[param], []).append(param)
    return list(found.values())


def choose_rows(exchange: Exchange, sums: Sums) -> dict[int, Chosen]:
    """Of each matrix the rows with the largest sums, the first ones among equals, on all ranks alike.

    Sums are joined here where other ranks hold the rest of a row, 8 bytes a row on the wire, and rounded once to fp32,
    so that borders make no difference. Flags are where the sums are.
    """
    plan, device = exchange.plan, sums.joined.device
    if not sums.of:
        return {}
    # All parameters at once: what lies on the host crosses in one copy there and one back.
    joined = sums.joined.to(exchange.comm.device(device))
    if plan.cut:
        exchange.comm.all_reduce(joined[: sums.travelling])
    views = [plan.views[run[0]] for run in sums.runs]
    sizes = [len(run) * view.of_rows.numel for run, view in zip(sums.runs, views, strict=True)]
    parts = joined.float().split(sizes)
    flags = torch.cat([_largest(view, part, plan.fraction) for view, part in zip(views, parts, strict=True)])
    own, there = flags.to(device), _counted(flags.cpu())
    before = _counted(own) if device.type != "cpu" else there
    found, begin = {}, 0
    for param, of_rows in sums.of.items():
        end = begin + len(of_rows)
        found[param] = Chosen(plan.views[param], own[begin:end], there[begin : end + 1], before[begin : end + 1])
        begin = end
    return found


def _counted(flags: Tensor) -> Tensor:
    """How many are set before each, and in all."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))


def _largest(view: MatrixView, sums: Tensor, fraction: float) -> Tensor:
    """Which rows of equal parameters are chosen: sums (B * rows,) -> (B * rows,) of bool."""
    flags = torch.zeros_like(sums)
    shape = -1, view.of_rows.numel
    for group, out in zip(view.row_groups(sums.view(shape)), view.row_groups(flags.view(shape)), strict=True):
        order = group.sort(dim=-1, descending=True, stable=True).indices
        out.scatter_(-1, order[..., : selected_rows(group.shape[-1], fraction)], 1.0)
    return flags.bool()


def rows_of(view: MatrixView, start: int) -> Rows:
    """How a slice that begins at ``start`` lies in rows."""
    return Rows(start=start, columns=view.columns, rows=view.rows, turned=view.transpose)


def add_row_sums(view: MatrixView, start: int, values: Tensor, out: Tensor) -> None:
    """Add the magnitudes of a slice's ``values``, which begins at ``start``, to the sums of their rows, in fp64.

    A kernel writes them: a rank holds one slice of a parameter.
    """
    if fused.step("sum_rows", (values, out), (rows_of(view, start),)):
        return
    for begin, end in _runs(view, start, len(values), _CHUNK.get(values.device.type, _CHUNK["cuda"])):
        part, first = values[begin:end], start + begin
        if view.transpose:
            rows = view.spread(torch.arange(len(out), dtype=torch.int64, device=out.device), first, len(part))
            out.index_add_(0, rows, part.abs().double())
        elif len(part) < view.columns:
            out[first // view.columns] += part.to(torch.float64, copy=True).abs_().sum()
        else:
            lines = part.view(-1, view.columns)
            out[first // view.columns :][: len(lines)] += lines.to(torch.float64, copy=True).abs_().sum(dim=1)


def _runs(view: MatrixView, start: int, numel: int, most: int) -> Iterator[tuple[int, int]]:
    """A slice in runs that are added up at once: what a border leaves of a row, and as many whole rows as fit."""
    if view.transpose:
        yield from ((begin, min(begin + most, numel)) for begin in range(0, numel, most))
        return
    head = min(-start % view.columns, numel)
    tail = max(head, numel - (start + numel) % view.columns)
    step = max(1, most // view.columns) * view.columns
    whole = [(begin, min(begin + step, tail)) for begin in range(head, tail, step)]
    yield from ((begin, end) for begin, end in [(0, head), *whole, (tail, numel)] if begin < end)
