"""What owners do with the matrices they get: parameters come as they are stored, and go through the rule's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_optim.matrix.shapes import Part
from ds_optim.matrix.views import MatrixView
from ds_optim.optimizers.updates import SCALES, Finish
from ds_optim.sharding.exchange import Exchange, Solve
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.lines import Values
from ds_optim.sharding.plan import ExchangePlan


def scale_of(view: MatrixView, name: str | None) -> float:
    """The scale of a parameter's first matrix; :func:`shaped` puts the others in proportion to it."""
    if name is None:
        return 1.0
    _, rows, columns = (view.of or view).matrices()[0]
    return SCALES[name](rows, columns)


def shaped(plan: ExchangePlan, scale: str | None, finish: Finish | None = None) -> Solve:
    """The work of a plan's owners: (B, numel) parameters of one view -> (B, numel) results, in proportion to the first
    matrix's scale; finish: see :class:`MatrixUpdate`."""

    def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
        return _whole(plan, view, stacks, finish) if not view.is_cut_up else _cut_up(plan, view, stacks, scale, finish)

    return solve


def _solved(plan: ExchangePlan, parts: Sequence[Tensor], finish: Finish | None) -> Sequence[Tensor]:
    """What goes back of batches of matrices: the shape's result, finished, and rows, which the finish has moved on."""
    results = plan.shape.solve(parts, plan.polar)
    if finish is None:
        return results
    weights = parts[1] if plan.shape.weights else None
    rows = parts[-1].flatten(1) if plan.shape.rows else None
    many = len(results[0])
    # As in polar: on a CPU each matrix alone, so that its bits do not depend on its neighbours in the stack.
    each = many if plan.stacked else 1
    for first in range(0, many, each):
        chosen = [None if values is None else values[first : first + each] for values in (weights, rows)]
        finish(results[0][first : first + each], *chosen)
    return [results[0], *([parts[-1]] if plan.shape.rows else [])]


def _whole(plan: ExchangePlan, view: MatrixView, stacks: Sequence[Tensor], finish: Finish | None) -> Sequence[Tensor]:
    """Whole parameters, or stacks of heads or experts."""
    ((_, m, n),) = view.matrices()
    seen = [stack.view((-1, m) if part.per_row else (-1, m, n)) for stack, part in zip(stacks, plan.there, strict=True)]
    return [result.view(len(stacks[0]), -1) for result in _solved(plan, seen, finish)]


def _cut_up(
    plan: ExchangePlan, view: MatrixView, stacks: Sequence[Tensor], scale: str | None, finish: Finish | None
) -> Sequence[Tensor]:
    """Matrices that are taken out of their parameters by a copy, and results that are put back into such."""
    there = [(_seen(view, part), stack) for stack, part in zip(stacks, plan.there, strict=True)]
    solved: list[Sequence[Tensor]] = []  # by block, and part that goes back
    for number in range(len(view.matrices())):
        results = _solved(plan, [seen.taken(stack, number) for seen, stack in there], finish)
        _, m, n = (view.of or view).matrices()[number]
        relative = 1.0 if scale is None else SCALES[scale](m, n) / scale_of(view, scale)
        if relative != 1.0:  # matrices of unlike shape in one parameter, as in a grouped-query QKV
            results[0].mul_(relative)  # in fp32, rounded once
        solved.append(results)
    packed = []
    for number, part in enumerate(plan.back):
        out = stacks[number] if part == plan.there[number] else stacks[0].new_empty(stacks[0].shape, dtype=part.dtype)
        _seen(view, part).pack_into([results[number] for results in solved], out)
        packed.append(out)
    return packed


def _seen(view: MatrixView, part: Part) -> MatrixView:
    """How what travels of a parameter is seen as matrices: its elements, or a column with a value for each row."""
    return view.of_rows if part.per_row else view


def flags(
    exchange: Exchange, fill: Values, test: Callable[[Tensor], Tensor], absent: frozenset[int]
) -> dict[int, bool]:
    """By parameter, for those of which this rank holds a slice, whether all its matrices pass ``test``.

    test: (B, m, n) -> (B,) of bool. The owner's answer travels back as a result does; the host waits for all of them at
    once.
    """
    found: dict[int, Tensor] = {}

    def solve(view: MatrixView, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
        answers = [torch.cat([test(block) for block in view.unpack(row)]).all() for row in stacks[0]]
        result = torch.empty(stacks[0].shape, dtype=exchange.plan.back[0].dtype, device=stacks[0].device)
        return [result.copy_(torch.stack(answers)[:, None])]

    def keep(held: Slice, results: Sequence[Tensor]) -> None:
        found[held.param] = results[0][:1].clone()  # of the message, which goes

    exchange.run(fill, solve, keep, absent)
    answers = torch.cat(list(found.values())).tolist() if found else []
    return {param: bool(answer) for param, answer in zip(found, answers, strict=True)}
