"""Copies between messages, where slices stand one behind the other, and stacks of whole parameters.

Slices of equal parameters lie in even steps: those of one rank in a message line by line, and what equal ranks have of
them message by message. So a run of equal parameters takes a few copies, whatever the number of its slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ds_optim.elementwise.fused import together
from ds_optim.elementwise.steps import copy_into


class Lie(NamedTuple):
    """Where a slice's values lie: in a message from ``begin`` on, and in a row of a run's stack from ``place`` on."""

    run: int
    row: int
    begin: int
    place: int
    numel: int


class Copy(NamedTuple):
    """So many ranks' values of so many rows of a stack. message, stack: first value, and steps from rank to rank."""

    run: int
    row: int
    ranks: int
    rows: int
    numel: int
    message: tuple[int, int]
    stack: tuple[int, int]

    def views(self, message: Tensor, stack: Tensor) -> tuple[Tensor, Tensor]:
        """What is copied between: (ranks, rows, values) of a message (n,) and of a stack (rows, values of a whole), or
        (values,) where it is one slice."""
        (begin, ahead), (place, onward) = self.message, self.stack
        if self.ranks == self.rows == 1:
            return message[begin : begin + self.numel], stack[self.row, place : place + self.numel]
        size, (row, value) = (self.ranks, self.rows, self.numel), stack.stride()
        first = stack.storage_offset() + self.row * row + place * value
        in_message = message.as_strided(size, (ahead, self.numel, 1), message.storage_offset() + begin)
        return in_message, stack.as_strided(size, (onward * value, row, value), first)


def copies_of(slices: Iterable[Lie], *, even: bool = True) -> list[Copy]:
    """The copies of slices that stand in a message one behind the other, rank by rank.

    even: whether some may lie in even steps; each is a copy else, which kernels take in one launch.
    """
    if not even:
        return [_line(lie, 1) for lie in slices if lie.numel]
    found: dict[int, list[Copy]] = {}
    for lines in _lines(slices):
        earlier = found.setdefault(lines.run, [])
        joined = _joined(earlier[-1], lines) if earlier else None
        if joined is None:
            earlier.append(lines)
        else:
            earlier[-1] = joined
    return [one for copies in found.values() for one in copies]


def _lines(slices: Iterable[Lie]) -> Iterable[Copy]:
    """Neighbours of one place and length in rows that follow each other, together."""
    first, rows = None, 0
    for lie in slices:
        if not lie.numel:
            continue
        if first is not None and lie == first._replace(row=first.row + rows, begin=first.begin + rows * first.numel):
            rows += 1
            continue
        if first is not None:
            yield _line(first, rows)
        first, rows = lie, 1
    if first is not None:
        yield _line(first, rows)


def _line(first: Lie, rows: int) -> Copy:
    return Copy(first.run, first.row, 1, rows, first.numel, (first.begin, 0), (first.place, 0))


def _joined(before: Copy, lines: Copy) -> Copy | None:
    """Both, where the second is as far from the first's last rank as those are from each other."""
    if (before.row, before.rows, before.numel) != (lines.row, lines.rows, lines.numel):
        return None
    steps = []
    for (first, step), (begin, _) in ((before.message, lines.message), (before.stack, lines.stack)):
        onward = begin - first - (before.ranks - 1) * step
        if onward < 0 or (before.ranks > 1 and onward != step):
            return None
        steps.append(onward)
    message, stack = ((place[0], step) for place, step in zip((before.message, before.stack), steps, strict=True))
    return before._replace(ranks=before.ranks + 1, message=message, stack=stack)


Stacks = Sequence[Sequence[Tensor]]
"""By run, a tensor (rows, values of a whole) for each part that travels."""


def to_stacks(copies: Sequence[Sequence[Copy]], messages: Sequence[Tensor], stacks: Stacks) -> None:
    """Bring slices from the messages, one a part, to their places in stacks. copies: of each part."""
    with together():
        for values, place in _pairs(copies, messages, stacks):
            _copied(place, values)


def to_messages(copies: Sequence[Sequence[Copy]], stacks: Stacks, messages: Sequence[Tensor]) -> None:
    """The inverse of :func:`to_stacks`."""
    with together():
        for place, values in _pairs(copies, messages, stacks):
            _copied(place, values)


def _pairs(
    copies: Sequence[Sequence[Copy]], messages: Sequence[Tensor], stacks: Stacks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in messages, and in stacks."""
    for number, (of_part, message) in enumerate(zip(copies, messages, strict=True)):
        for one in of_part:
            yield one.views(message, stacks[one.run][number])


def _copied(out: Tensor, values: Tensor) -> None:
    if out.dim() == 1:
        copy_into(out, values)
    else:
        out.copy_(values)
