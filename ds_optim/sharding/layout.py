"""Where the elements of every parameter live: in closed form, for every rank, without a model.

ZeRO-1/2 lay a parameter group out as one flat vector and cut it into equal partitions, so a border may
cut a parameter anywhere. ZeRO-3 cuts every parameter into as many slices as there are ranks and packs a
rank's slices of a sub-group behind each other. Unsharded training is the same picture with one slice a
parameter. Everything else (sums over parameters, exchanges of matrices, simulations of clusters that are
not there) is built on the three questions that a :class:`Unit` answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

Cut = Literal["none", "flat", "each"]
T = TypeVar("T")
MOST_RANKS = 1 << 17
"""More are a mistake where a number of ranks is written: each costs time, memory or files."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How tensor parallelism cut a parameter, before ZeRO cut what each of its ranks holds.

    whole: the shape before. dim: the dimension that was cut. pieces: for each rank of the tensor-parallel group,
    (first, size) of the runs along it that lie one behind the other in the rank's shard. rank: whose shard this is;
    all else the ranks have alike.
    """

    whole: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    rank: int = field(default=0, compare=False, repr=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What each rank of the tensor-parallel group holds along the dimension."""
        return tuple(sum(size for _, size in own) for own in self.pieces)


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A parameter as the layout knows it: its ``name`` in the model and its full ``shape``.

    shard: under tensor parallelism, what part of a whole parameter ``shape`` is; None for one that is not cut.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def noise_name(self) -> str:
        """By what random numbers for its elements are drawn: each shard has its own."""
        return f"{self.name}/{self.shard.rank}" if self.shard is not None and self.shard.rank else self.name

    @property
    def whole_numel(self) -> int:
        """Elements of the parameter on all tensor-parallel ranks."""
        return self.numel if self.shard is None else math.prod(self.shard.whole)


@dataclass(frozen=True)
class Slice:
    """A run of elements of one parameter in a rank's memory.

    Elements ``[start, start + numel)`` of the flattened parameter number ``param`` of the unit stand at
    ``[offset, offset + numel)`` of the rank's tensor number ``tensor`` (always 0 under ZeRO, where a unit
    is one flat partition; the parameter's own number where nothing is sharded).
    """

    param: int
    start: int
    numel: int
    tensor: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The parameters that one flat partition per rank holds: what one ``step()`` of ZeRO is about.

    ``cut`` says how: "flat" (stages 1 and 2: one vector cut into equal partitions), "each" (stage 3: each
    parameter cut), "none" (not sharded). ``group`` is the number of the optimizer's parameter group.
    ``param_alignment`` is the multiple of elements at which each parameter starts (stages 1 and 2).
    """

    group: int
    params: tuple[ParamSpec, ...]
    cut: Cut
    world_size: int
    param_alignment: int = 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each parameter starts: in the whole flat vector ("flat"), or in a rank's partition ("each")."""
        starts, position = [], 0
        for spec in self.params:
            starts.append(position)
            position += self._shard(spec.numel) if self.cut == "each" else spec.numel
            if self.cut == "flat" and spec is not self.params[-1]:
                position += -position % self.param_alignment
        return tuple(starts)

    @cached_property
    def partition_numel(self) -> int:
        """Elements of a rank's flat partition, padding counted in."""
        if self.cut == "each":
            return sum(self._shard(spec.numel) for spec in self.params)
        length = self.starts[-1] + self.params[-1].numel
        if self.cut == "none":
            return length
        # DeepSpeed aligns every partition to 4 bytes of a 16-bit type: two elements a rank.
        alignment = 2 * self.world_size
        return math.ceil(length / alignment) * alignment // self.world_size

    def _shard(self, numel: int) -> int:
        return math.ceil(numel / self.world_size)

    def slice_of(self, param: int, rank: int) -> Slice | None:
        """The slice of parameter number ``param`` that ``rank`` holds; None if it holds none."""
        numel, start = self.params[param].numel, self.starts[param]
        if self.cut == "none":
            return Slice(param, 0, numel, param, 0)
        if self.cut == "each":
            shard = self._shard(numel)
            first = min(rank * shard, numel)
            held = min(shard, numel - first)
            return Slice(param, first, held, 0, start) if held else None
        left = max(start, rank * self.partition_numel)
        right = min(start + numel, (rank + 1) * self.partition_numel)
        return Slice(param, left - start, right - left, 0, left - rank * self.partition_numel) if left < right else None

    def slices(self, rank: int) -> Iterator[Slice]:
        """The slices that ``rank`` holds, in the order of its memory."""
        for param in range(len(self.params)):
            held = self.slice_of(param, rank)
            if held is not None:
                yield held

    def holders(self, param: int) -> list[tuple[int, Slice]]:
        """``(rank, slice)`` of every rank that holds a part of parameter number ``param``, by rank."""
        if self.cut == "flat":  # only neighbours share a parameter: do not ask a thousand ranks
            size, start = self.partition_numel, self.starts[param]
            ranks = range(start // size, (start + self.params[param].numel - 1) // size + 1)
        else:
            ranks = range(self.world_size if self.cut == "each" else 1)
        pairs = ((rank, self.slice_of(param, rank)) for rank in ranks)
        return [(rank, held) for rank, held in pairs if held is not None]

    def padding(self, rank: int) -> int:
        """Elements of ``rank``'s partition that belong to no parameter."""
        return 0 if self.cut == "none" else self.partition_numel - sum(s.numel for s in self.slices(rank))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All units of a training run, in the order in which ZeRO steps them."""

    stage: int
    world_size: int
    units: tuple[Unit, ...]

    def digest(self) -> str:
        """A hash that two ranks share only if they mean the same layout."""
        text = repr((self.stage, self.world_size, self.units))
        return hashlib.sha256(text.encode()).hexdigest()


def build_layout(
    groups: Sequence[Sequence[ParamSpec]],
    *,
    stage: int,
    world_size: int,
    param_alignment: int = 1,
    sub_group_size: int | None = None,
    round_robin: bool = False,
    group_ranks: Sequence[int] | None = None,
) -> Layout:
    """The layout of DeepSpeed 0.19.8 in closed form.

    Args:
        groups: for each parameter group its trainable parameters with at least one element, in order.
        stage: ZeRO stage; 0 lays nothing out across ranks.
        world_size: ranks in the parameters' data-parallel group.
        param_alignment: elements at which each parameter is aligned (stages 1, 2; DeepSpeed's
            ``zero_optimization.parameter_alignment`` makes it 16 bytes' worth).
        sub_group_size: elements of a rank's partition at which stage 3 closes a sub-group.
        round_robin: DeepSpeed's ``round_robin_gradients``, which orders the parameters of stages 1 and 2 anew.
        group_ranks: of each group, the ranks that share its parameters, where experts have fewer than ``world_size``.
    """
    units: list[Unit] = []
    for number, specs in enumerate(groups):
        if not specs:
            continue
        ranks = world_size if group_ranks is None else group_ranks[number]
        if stage == 3:
            members = _sub_groups(specs, ranks, sub_group_size)
            units += [Unit(group=number, params=m, cut="each", world_size=ranks) for m in members]
        elif stage == 0:
            units.append(Unit(group=number, params=tuple(specs), cut="none", world_size=1))
        else:
            units.append(
                Unit(
                    group=number,
                    params=tuple(dealt(specs, ranks) if round_robin else specs),
                    cut="flat",
                    world_size=ranks,
                    param_alignment=param_alignment,
                )
            )
    return Layout(stage=stage, world_size=world_size if stage else 1, units=tuple(units))


def has_padding(unit: Unit) -> bool:
    """Whether a parameter of a flat vector does not start where the one before it ends."""
    return unit.starts[-1] > sum(spec.numel for spec in unit.params[:-1])


def dealt(things: Sequence[T], ranks: int) -> list[T]:
    """In the order of DeepSpeed's ``round_robin_gradients``: dealt to so many ranks one by one, then rank by rank."""
    return [thing for rank in range(ranks) for thing in things[rank::ranks]]


def undealt(things: Sequence[T], ranks: int) -> list[T]:
    """The order of before, of things that were dealt to so many ranks."""
    before = dealt(range(len(things)), ranks)
    return [things[before.index(number)] for number in range(len(things))]


def _sub_groups(specs: Sequence[ParamSpec], world_size: int, sub_group_size: int | None) -> list[tuple[ParamSpec, ...]]:
    """Stage 3 fills a sub-group until it holds ``sub_group_size`` elements a rank, then opens the next."""
    shards = [math.ceil(spec.numel / world_size) for spec in specs]
    if sub_group_size is None or sub_group_size >= sum(shards):
        return [tuple(specs)]
    closed: list[tuple[ParamSpec, ...]] = []
    current: list[ParamSpec] = []
    held = 0
    for spec, shard in zip(specs, shards, strict=True):
        current.append(spec)
        held += shard
        if held >= sub_group_size:
            closed.append(tuple(current))
            current, held = [], 0
    return [*closed, tuple(current)] if current else closed
