"""Some rows of each matrix, chosen by what all ranks together hold of them: which they are, and where they lie.

As the chosen rows stand in a parameter one behind the other, those in a rank's slice are a run of the smaller parameter
that they make. So they are exchanged as a unit of such parameters, by the owners and in the buckets of the whole plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ds_optim.matrix.views import MatrixView, selected_rows
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import ParamSpec, Slice, Unit
from ds_optim.sharding.plan import Bucket, ExchangePlan

#: Elements that are added up in fp64 at a time, by kind of device: on CUDA as few launches as 32 MiB of scratch allow.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}


@dataclass(frozen=True)
class Chosen:
    """Rows of a parameter's matrices. flags: of each row, counted as in ``view.of_rows``; sums: how many before it."""

    view: MatrixView
    flags: Tensor
    sums: Tensor

    def mask(self, held: Slice) -> Tensor:
        """Of each element of a slice, (n,), whether its row is chosen."""
        return self.view.spread(self.flags, held.start, held.numel)

    def run(self, held: Slice) -> tuple[int, int]:
        """A slice's elements of chosen rows, first and last + 1, counted through all of the parameter's."""
        return self._before(held.start), self._before(held.start + held.numel)

    def _before(self, element: int) -> int:
        columns, rows = self.view.columns, self.view.rows
        if element == self.view.numel:
            return int(self.sums[-1]) * columns
        if not self.view.transpose:
            row, column = divmod(element, columns)
            first, last = self.sums[row : row + 2].tolist()
            return int(first * columns + column * (last - first))
        stack, rest = divmod(element, columns * rows)
        line, row = divmod(rest, rows)
        begin, here, end = (int(self.sums[stack * rows + at]) for at in (0, row, rows))
        return begin * columns + line * (end - begin) + here - begin


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


def choose_rows(exchange: Exchange, sums: Mapping[int, Tensor], device: torch.device) -> dict[int, Chosen]:
    """Of each matrix the rows with the largest sums, the first ones among equals, on all ranks alike.

    sums: of parameters, (rows,) in fp64, as far as this rank holds a part of each row; joined here where others hold
    the rest, 8 bytes a row on the wire, and rounded once to fp32, so that borders make no difference.
    device: for flags.
    """
    plan, wire = exchange.plan, exchange.comm.device(device)
    here = [param for batch in plan.whole[exchange.comm.rank] for param in batch]
    sizes = {param: plan.views[param].of_rows.numel for param in (*plan.cut, *here)}
    if not sizes:
        return {}
    none = {param: torch.zeros(size, dtype=torch.float64, device=device) for param, size in sizes.items()}
    # All parameters at once: what lies on the host crosses in one copy there and one back.
    joined = torch.cat([sums.get(param, none[param]) for param in sizes]).to(wire)
    if plan.cut:
        exchange.comm.all_reduce(joined[: sum(sizes[param] for param in plan.cut)])
    parts = joined.float().split(list(sizes.values()))
    flags = torch.cat([_largest(plan.views[p], part, plan.fraction) for p, part in zip(sizes, parts, strict=True)])
    own, there = flags.to(device).split(list(sizes.values())), flags.cpu().split(list(sizes.values()))
    return {
        param: Chosen(plan.views[param], rows, torch.nn.functional.pad(counted.cumsum(0), (1, 0)))
        for param, rows, counted in zip(sizes, own, there, strict=True)
    }


def _largest(view: MatrixView, sums: Tensor, fraction: float) -> Tensor:
    """Which rows are chosen: sums (rows,) -> (rows,) of bool."""
    flags = torch.zeros_like(sums)
    for group, out in zip(view.row_groups(sums), view.row_groups(flags), strict=True):
        order = group.sort(dim=-1, descending=True, stable=True).indices
        out.scatter_(-1, order[..., : selected_rows(group.shape[-1], fraction)], 1.0)
    return flags.bool()


def add_row_sums(view: MatrixView, start: int, values: Tensor, out: Tensor) -> None:
    """Add the magnitudes of a slice's ``values``, which begins at ``start``, to the sums of their rows, in fp64."""
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
