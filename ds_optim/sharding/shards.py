"""Matrices that tensor parallelism cut: shards come together on one rank of the group, and results go back.

ZeRO's exchange has brought each shard together on one data-parallel rank, the same one for every rank of the
tensor-parallel group. There the matrices of a stack are dealt to the group's ranks by turns: shards travel to their
owner, are put together to what the matrix is without tensor parallelism, and parts of the result travel back. It is
worked on in the very same way, so that its bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_optim.matrix.shapes import Part
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Shard

Solve = Callable[[MatrixView, Sequence[Tensor]], Sequence[Tensor]]
"""Stacks (B, values) of equal parameters, one for each part that came -> of the results, one for each part that goes
back."""


@dataclass(frozen=True, kw_only=True)
class ShardView(MatrixView):
    """A shard, (its rows, its columns) as a slice of it is placed, and the view of the whole parameter.

    Its matrices are the whole parameter's: costs, scales and scratch follow from them.
    """

    whole: MatrixView
    shard: Shard

    @staticmethod
    def of_whole(whole: MatrixView, shard: Shard, shape: tuple[int, ...]) -> ShardView:
        """The view of a shard of this shape."""
        return ShardView(shape=shape, transpose=whole.transpose, batch_dims=whole.batch_dims, whole=whole, shard=shard)

    @cached_property
    def _matrices(self) -> tuple[tuple[int, int, int], ...]:
        return self.whole._matrices

    @property
    def times(self) -> float:
        """Elements of the whole for each of the shard."""
        return self.whole.numel / self.numel

    def joined(self, shards: Tensor, part: Part) -> Tensor:
        """Whole parameters from their shards, (ranks, B, values of a shard) -> (B, values)."""
        out = shards.new_empty(shards.shape[1], part.place(self.whole, 0, self.whole.numel)[1])
        for shard, pieces in zip(shards, self._cut_along(out, part), strict=True):
            for values, place in _side_by_side(shard, pieces, self._dim(part)):
                place.copy_(values)
        return out

    def parted(self, wholes: Tensor, part: Part) -> Tensor:
        """The inverse: (B, values) -> (ranks, B, values of a shard); of a value that all shards have, a copy each."""
        ranks = len(self.shard.pieces)
        out = wholes.new_empty(ranks, len(wholes), part.place(self, 0, self.numel)[1])
        for shard, pieces in zip(out, self._cut_along(wholes, part), strict=True):
            for place, values in _side_by_side(shard, pieces, self._dim(part)):
                place.copy_(values)
        return out

    def _dim(self, part: Part) -> int | None:
        """The dimension of a stack of parameters' values that is cut; None for values that all shards have: of rows,
        where columns are cut."""
        dim = self.shard.dim
        if not part.per_row:
            return dim + 1
        row = len(self.shape) - 1 if self.transpose else self.batch_dims
        return dim + 1 if dim < self.batch_dims else self.batch_dims + 1 if dim == row else None

    def _cut_along(self, wholes: Tensor, part: Part) -> Iterator[list[Tensor]]:
        """For each rank the runs of (B, values) that lie in its shard one behind the other, (B, ...) each."""
        shape = self.whole.of_rows.shape[:-1] if part.per_row else self.whole.shape
        seen, dim = wholes.view(-1, *shape), self._dim(part)
        for own in self.shard.pieces:
            yield [seen] if dim is None else [seen.narrow(dim, first, size) for first, size in own]


def _side_by_side(shard: Tensor, pieces: Sequence[Tensor], dim: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The runs of a shard, (B, values), each with its place in the whole."""
    if dim is None:
        yield shard.view(pieces[0].shape), pieces[0]
        return
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    runs = shard.view(shape).split([piece.shape[dim] for piece in pieces], dim=dim)
    yield from zip(runs, pieces, strict=True)


def solve_whole(
    tensor: Comm,
    first: int,
    view: ShardView,
    parts: tuple[Sequence[Part], Sequence[Part]],
    stacks: Sequence[Tensor],
    solve: Solve,
) -> list[Tensor]:
    """What ``solve`` makes of the whole parameters, as far as it lies in this rank's shards.

    All ranks of ``tensor`` call it with stacks of the same parameters.

    Args:
        first: the rank that owns the first parameter of the stack; the next one has the next.
        parts: what travels there and back.
        stacks: for each part there, (B, values of a shard).

    Returns:
        For each part back, (B, values of a shard).
    """
    ranks = tensor.world_size
    owned = [[row for row in range(len(stacks[0])) if (first + row) % ranks == rank] for rank in range(ranks)]
    order = [row for rows in owned for row in rows]
    there, back = parts
    wholes = [view.joined(_dealt(tensor, stack[order], owned), part) for stack, part in zip(stacks, there, strict=True)]
    mine = len(owned[tensor.rank])
    results = solve(view.whole, wholes) if mine else []
    found = []
    for number, part in enumerate(back):
        values = part.place(view, 0, view.numel)[1]
        sent = view.parted(results[number], part) if mine else stacks[0].new_empty(0, dtype=part.dtype)
        arrived = torch.empty(len(order), values, dtype=part.dtype, device=stacks[0].device)
        counts = [mine * values] * ranks
        tensor.all_to_all(arrived.view(-1), [len(rows) * values for rows in owned], sent.view(-1), counts).wait()
        out = torch.empty_like(arrived)
        out[order] = arrived
        found.append(out)
    return found


def _dealt(tensor: Comm, ordered: Tensor, owned: Sequence[Sequence[int]]) -> Tensor:
    """Shards, (B, values) in the order of their owners -> those of this rank's parameters, (ranks, own, values)."""
    values, mine = ordered.shape[1], len(owned[tensor.rank])
    arrived = ordered.new_empty(tensor.world_size, mine, values)
    counts = [len(rows) * values for rows in owned]
    out_counts = [mine * values] * tensor.world_size
    tensor.all_to_all(arrived.view(-1), out_counts, ordered.reshape(-1), counts).wait()
    return arrived
