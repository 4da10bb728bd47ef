"""Slices whose values stand in flat tensors, in messages one behind the other or in the rows of stacks, and what takes
them: one by one, or where it can all at once, so that Python a step does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from ds_optim.elementwise.fused import together
from ds_optim.elementwise.momentum import scales_numel
from ds_optim.elementwise.native.tables import Row, Table
from ds_optim.elementwise.noise import stream_of
from ds_optim.sharding.layout import Slice, Unit

Values = Callable[[Slice, Sequence[Tensor]], None]
"""Called with a slice and 1-D values of it, one tensor for each part that travels: to write them into messages to the
owner, or to take them as results from it."""
Pieces = Iterator[tuple[Slice, Sequence[Tensor]]]


class Lines:
    """What ``rank`` holds of some parameters of a unit, and where it stands in flat tensors, in their order.

    lies: for each part that travels, (first, number of values) of each slice in its tensor.
    """

    def __init__(
        self, unit: Unit, rank: int, slices: Sequence[Slice], lies: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        self.slices = slices
        self._unit = unit
        self._rank = rank
        self._lies = lies
        self._tables: dict[tuple[int, str | None], Table] = {}
        self._cuts: dict[int, tuple[list[int], slice]] = {}

    def seen_as(self, unit: Unit, slices: Sequence[Slice]) -> Lines:
        """The same values, as other slices: of another unit's parameters."""
        return Lines(unit, self._rank, slices, self._lies)

    @property
    def sizes(self) -> list[int]:
        """Of the tensors: of each part, up to the last slice's end."""
        return [sum(lies[-1]) if lies else 0 for lies in self._lies]

    def table(
        self, part: int = 0, scale: str | None = None, scale_of: Callable[[int], float] = lambda param: 1.0
    ) -> Table:
        """The slices for kernels, beside the tensor of a part. scale: the name of what ``scale_of`` says."""
        if (part, scale) not in self._tables:
            blocks = blocks_of(self._unit, self._rank)
            rows = []
            for held, (at, _) in zip(self.slices, self._lies[part], strict=True):
                stream, block = stream_of(self._unit.params[held.param].noise_name), blocks[held.param][0]
                rows.append(Row(held.numel, held.offset, at, block, stream, held.start, scale_of(held.param)))
            self._tables[part, scale] = Table(rows)
        return self._tables[part, scale]

    def pieces(self, tensors: Sequence[Tensor]) -> Pieces:
        """Each slice with its values in a tensor for each part."""
        if self.slices:
            cut = [self.cut(part, tensor) for part, tensor in enumerate(tensors)]
            yield from zip(self.slices, zip(*cut, strict=True), strict=True)

    def cut(self, part: int, tensor: Tensor) -> Sequence[Tensor]:
        """Each slice's values in the tensor of a part, which is cut at once: slices one by one cost a dispatch each."""
        if part not in self._cuts:
            ends = [0, *map(sum, self._lies[part])]
            counts = [count for _, count in self._lies[part]]
            gaps = [first - end for (first, _), end in zip(self._lies[part], ends, strict=False)]
            gaps.append(tensor.numel() - ends[-1])
            between = [*chain.from_iterable(zip(gaps, counts, strict=False)), gaps[-1]], slice(1, None, 2)
            self._cuts[part] = between if any(gaps) else (counts, slice(None))
        sizes, chosen = self._cuts[part]
        return tensor.reshape(-1).split(sizes)[chosen]


@dataclass(frozen=True)
class Both:
    """What is done to slices one by one, and to all of some at once, with a tensor for each part that travels.

    all: answers whether it could; if not, nothing is changed but messages.
    """

    each: Values
    all: Callable[[Lines, Sequence[Tensor]], bool]

    def __call__(self, held: Slice, values: Sequence[Tensor]) -> None:
        self.each(held, values)


def call(function: Values, lines: Sequence[Lines], tensors: Sequence[Sequence[Tensor]]) -> None:
    """Call a function of slices with those of some lines, and their values in the tensors of each part."""
    left = [one for one in zip(lines, tensors, strict=True) if not _all_at_once(function, *one)]
    with together():
        _one_by_one(function, left)


def _all_at_once(function: Values, lines: Lines, tensors: Sequence[Tensor]) -> bool:
    if not isinstance(function, Both) or not all(tensor.is_contiguous() for tensor in tensors):
        return False
    return not lines.slices or function.all(lines, [tensor.view(-1) for tensor in tensors])


def _one_by_one(function: Values, left: Iterable[tuple[Lines, Sequence[Tensor]]]) -> None:
    # A loop in a function of its own: a variable left over from one would keep a message alive.
    for lines, tensors in left:
        for held, values in lines.pieces(tensors):
            function(held, values)


def lines_of(unit: Unit, rank: int) -> Lines:
    """All slices of a rank, as they lie in its partition."""
    held = list(unit.slices(rank))
    return Lines(unit, rank, held, [[(one.offset, one.numel) for one in held]])


def blocks_of(unit: Unit, rank: int) -> dict[int, tuple[int, int]]:
    """For each parameter of which ``rank`` holds a slice, the first of its blocks of int8 momentum and their number.

    They are counted through a flat partition; where nothing is sharded each parameter has its own.
    """
    found: dict[int, tuple[int, int]] = {}
    position = 0
    for held in unit.slices(rank):
        count = scales_numel(held.start, held.numel)
        found[held.param] = (0 if unit.cut == "none" else position), count
        position += count
    return found
