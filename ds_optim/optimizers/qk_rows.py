"""Which rows of attention's projections are a head's queries or keys, in weights of their own or in one for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optim.elementwise.chunks import chunk_elements
from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.binding import Member

QUERY, KEY, VALUE = 0, 1, 2
Block = tuple[int, int]
"""What a head's rows are, and the head's number."""


@dataclass(frozen=True)
class Projection:
    """A weight or bias with rows of queries or keys. blocks: what its rows are, in equal blocks, one a head."""

    layer: str
    view: MatrixView
    blocks: tuple[Block, ...]

    def factors(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of each row, given those of query heads and of key heads."""
        by_kind = {QUERY: queries, KEY: keys, VALUE: torch.ones_like(keys)}
        by_block = torch.stack([by_kind[kind][head] for kind, head in self.blocks])
        return by_block.repeat_interleave(self.view.rows // len(self.blocks))


def projections(
    pairs: Mapping[str, tuple[str, str] | str],
    members: Mapping[str, Member],
    heads: int,
    key_heads: int,
    interleaved: bool,
) -> dict[str, Projection]:
    """By name, all weights and biases of ``pairs`` (see :class:`QKClip`).

    Raises:
        UserError: a weight that is no matrix here, or whose rows are no multiple of the heads.
    """
    found = {}
    for layer, named in pairs.items():
        for name, blocks in _blocks(named, heads, key_heads, interleaved):
            view = members[name].view if name in members else None
            if view is None or view.rows % len(blocks):
                wrong = f"has {view.rows} rows for its heads" if view else "is no matrix that the optimizer steps"
                raise UserError(f"QKClip: {name!r} {wrong}: write the names of query and key weights")
            found[name] = Projection(layer, view, blocks)
            bias = name.removesuffix("weight") + "bias"
            if bias in members:
                found[bias] = Projection(layer, MatrixView(shape=(view.rows, 1)), blocks)
    return found


def _blocks(
    named: tuple[str, str] | str, heads: int, key_heads: int, interleaved: bool
) -> Iterator[tuple[str, tuple[Block, ...]]]:
    """Each weight of a layer with what its rows are."""
    queries = [(QUERY, head) for head in range(heads)]
    keys, values = ([(kind, head) for head in range(key_heads)] for kind in (KEY, VALUE))
    if not isinstance(named, str):
        yield from zip(named, (tuple(queries), tuple(keys)), strict=True)
        return
    blocks = [*queries, *keys, *values]
    if interleaved:  # a key with the queries that share it
        blocks.sort(key=lambda block: (block[1] if block[0] != QUERY else block[1] * key_heads // heads, block[0]))
    yield named, tuple(blocks)


def scale_rows(weights: Tensor, start: int, view: MatrixView, factors: Tensor) -> None:
    """Multiply a slice's weights, the parameter's from ``start`` on, by the factors of their rows (rows,)."""
    factors = factors.to(weights.device)
    for chunk in weights.split(chunk_elements(weights.device)):
        chunk.mul_(view.spread(factors, start, len(chunk)))
        start += len(chunk)
