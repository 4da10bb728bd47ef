"""Layouts of ZeRO's flat partitions, held against the memory that DeepSpeed 0.19.8 made.

Each closed form that may be the one is checked against the addresses that the parameters carry after
``deepspeed.initialize``, then against the values of the weights; the ranks compare notes before anyone proceeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ds_optim.sharding.binding import Binding, Groups, Member
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Layout, Slice, Unit, build_layout, dealt, has_padding
from ds_optim.zero.agree import raise_everywhere
from ds_optim.zero.swapped import masters, shard_of

SYNC_HINT = (
    "if weights were changed in place after deepspeed.initialize, call engine.optimizer.refresh_fp32_params() first"
)
FREEZE_HINT = "freeze and unfreeze parameters before deepspeed.initialize"

Address = tuple[int, int, int]
"""(start in the parameter, elements, offset in the flat partition) of what this rank holds."""
Members = Sequence[Sequence[Member]]


@dataclass(frozen=True)
class Comms:
    """All ranks of the dense parameters, and of each group of experts those that share it, by the group's number."""

    all: Comm
    experts: Mapping[int, Comm] = field(default_factory=dict)

    def of(self, unit: Unit) -> Comm:
        return self.experts.get(unit.group, self.all)

    def sizes(self, groups: int) -> list[int]:
        """Ranks of each of so many groups."""
        return [self.experts.get(number, self.all).world_size for number in range(groups)]


@dataclass(frozen=True)
class _Candidate:
    """A layout that may be the wrapper's, with the parameters in its order, and what else speaks against it here.

    ``marked``, ``owners``: the same as the addresses on the parameters have it, which are not the wrapper's own where
    it deals gradients round robin.
    """

    layout: Layout
    members: list[list[Member]]
    marked: Layout
    owners: list[list[Member]]
    problem: str | None = None


def bind_stages_1_2(trained: Members, comms: Comms, groups: Groups, stage: int, wrapper: Any) -> Binding:
    """Bind to the one flat partition of each group.

    wrapper: who lays memory out. Where the call comes from elsewhere, the values of the weights alone tell the order of
    parameters.
    """
    first = next(m.parameter for group in trained for m in group)
    # DeepSpeed aligns parameters to 16 bytes if asked to; the addresses tell which of the two it was.
    alignments = sorted({1, 16 // math.gcd(16, first.element_size())})
    order = getattr(wrapper, "round_robin_gradients", None)
    orders = (False, True) if order is None else (bool(order),)
    candidates = [_candidate(trained, comms, stage, a, order, wrapper) for order in orders for a in alignments]
    tensors = [[groups[unit.group]["params"][0]] for unit in candidates[0].layout.units]
    problems = [c.problem or _find_problem(c.marked, c.owners, tensors, comms, _mark) for c in candidates]
    fitting = _agree([c.layout for c in candidates], problems, comms.all)
    chosen = candidates[_same_values([candidates[n] for n in fitting], fitting, tensors, comms)]
    return _bound(chosen.layout, comms, tensors, chosen.members, first)


def _bound(
    layout: Layout, comms: Comms, tensors: list[list[Tensor]], members: list[list[Member]], first: torch.nn.Parameter
) -> Binding:
    fewer = {n: comms.of(unit) for n, unit in enumerate(layout.units) if unit.group in comms.experts}
    device = _work_device(comms.all, tensors[0][0], first)
    return Binding(layout, comms.all, device, tensors, members, experts=fewer)


def _candidate(trained: Members, comms: Comms, stage: int, alignment: int, order: bool, wrapper: Any) -> _Candidate:
    layouts = [
        build_layout(
            [[m.spec for m in group] for group in trained],
            stage=stage,
            world_size=comms.all.world_size,
            param_alignment=alignment,
            round_robin=robin,
            group_ranks=comms.sizes(len(trained)),
        )
        for robin in (False, True)
    ]
    plain = [list(trained[unit.group]) for unit in layouts[0].units]
    if not order:
        return _Candidate(layouts[0], plain, layouts[0], plain)
    members = [dealt(group, unit.world_size) for group, unit in zip(plain, layouts[0].units, strict=True)]
    # DeepSpeed's addresses on the parameters leave the order out of account, unless it has padding to account for.
    pairs = [zip(layout.units, own, strict=True) for layout, own in zip(layouts, (plain, members), strict=True)]
    marks = [own if has_padding(own[0]) else before for before, own in zip(*pairs, strict=True)]
    marked = replace(layouts[1], units=tuple(unit for unit, _ in marks))
    owners = [own for _, own in marks]
    return _Candidate(layouts[1], members, marked, owners, _order_problem(layouts[1], members, wrapper))


def _order_problem(layout: Layout, members: Members, wrapper: Any) -> str | None:
    """Whether a wrapper that deals round robin keeps the parameters in another order, or at other places."""
    if getattr(wrapper, "round_robin_gradients", None) is None:
        return None
    for unit, own in zip(layout.units, members, strict=True):
        kept = attribute(wrapper, "round_robin_bit16_groups")[unit.group]
        same = [id(p) for p in kept] == [id(m.parameter) for m in own]
        if not same or list(attribute(wrapper, "round_robin_bit16_offsets")[unit.group]) != list(unit.starts):
            return f"round_robin_gradients put the parameters of group {unit.group} in an order that is not known"
    return None


def _mark(unit: Unit, param: int, member: Member) -> Address | None:
    mapping = member.parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return there.start, there.numel, here.start


def bind_stage3(trained: Members, comms: Comms) -> Binding:
    """Bind to the flat partition of each sub-group of each group, in memory or in a file."""
    first = next(m.parameter for group in trained for m in group)
    zero: Any = first._z3_optimizer  # type: ignore[attr-defined]
    flats: list[Tensor] = attribute(zero, "fp32_partitioned_groups_flat")
    positions = attribute(zero, "grad_position")
    layout = build_layout(
        [[m.spec for m in group] for group in trained],
        stage=3,
        world_size=comms.all.world_size,
        sub_group_size=attribute(zero, "sub_group_size"),
        group_ranks=comms.sizes(len(trained)),
    )
    queue = iter([m for group in trained for m in group])
    members = [list(islice(queue, len(unit.params))) for unit in layout.units]

    def local_address(unit: Unit, param: int, member: Member) -> Address | None:
        try:
            number, offset, shard = positions[zero.get_param_id(member.parameter)]
        except KeyError:
            return None
        start = min(comms.of(unit).rank * shard, member.spec.numel)
        held = min(shard, member.spec.numel - start)
        if layout.units[number] is not unit:
            return -1, -1, -1
        return (start, held, offset) if held else None

    if len(flats) == len(layout.units):
        tensors = [[flat] for flat in flats]
        values = [[flat] for flat in masters(zero, layout, flats)]
        problem = _find_problem(layout, members, values, comms, local_address)
    else:
        tensors = values = []
        problem = f"ZeRO-3 made {len(flats)} sub-groups where the closed form has {len(layout.units)} ({FREEZE_HINT})"
    _agree([layout], [problem], comms.all)
    fault = _find_other_value(layout, members, values, comms, shard_of)
    raise_everywhere(None if fault is None else RuntimeError(fault), comms.all)
    return _bound(layout, comms, tensors, members, first)


def same(master: Tensor, own: Tensor) -> bool:
    """Whether a master slice, cast down, is the model's; a NaN equals a NaN."""
    cast = master.detach().to(own.device, own.dtype)
    return torch.equal(cast.nan_to_num(), own.nan_to_num())


def attribute(wrapper: Any, name: str) -> Any:
    """What a wrapper of DeepSpeed's keeps under a private name."""
    if not hasattr(wrapper, name):
        raise RuntimeError(
            f"DeepSpeed's {type(wrapper).__name__} has no {name!r}: this release lays memory out in a way that "
            "ds_optim does not know; install a version in the declared range (see ds_optim's pyproject.toml)"
        )
    return getattr(wrapper, name)


def _find_problem(
    layout: Layout,
    members: Members,
    tensors: Sequence[Sequence[Tensor]],
    comms: Comms,
    address: Callable[[Unit, int, Member], Address | None],
) -> str | None:
    """The first disagreement between the closed form and the addresses on this rank."""
    for unit, unit_members, (flat,) in zip(layout.units, members, tensors, strict=True):
        if flat.numel() != unit.partition_numel:
            return (
                f"a flat partition holds {flat.numel()} elements where the closed form has {unit.partition_numel} "
                f"({FREEZE_HINT})"
            )
        for param, member in enumerate(unit_members):
            if not hasattr(member.parameter, "_hp_mapping") and unit.cut == "flat":
                return f"{member.spec.name} has no address in ZeRO's partitions ({FREEZE_HINT})"
            there, here = address(unit, param, member), _address(unit.slice_of(param, comms.of(unit).rank))
            if there != here:
                return f"{member.spec.name} lies at {there} (start, elements, offset) where the closed form has {here}"
    return None


def _address(piece: Slice | None) -> Address | None:
    return None if piece is None else (piece.start, piece.numel, piece.offset)


def _agree(layouts: Sequence[Layout], problems: Sequence[str | None], comm: Comm) -> list[int]:
    """The numbers of the layouts that fit on every rank.

    Raises:
        RuntimeError: on every rank, with the first rank's reason, if none does or the ranks mean different ones.
    """
    everywhere = comm.gather_objects([(layout.digest(), p) for layout, p in zip(layouts, problems, strict=True)])
    fitting = [
        number
        for number, layout in enumerate(layouts)
        if all(candidates[number] == (layout.digest(), None) for candidates in everywhere)
    ]
    if fitting:
        return fitting
    for rank, candidates in enumerate(everywhere):
        if candidates[0][1] is not None:
            raise RuntimeError(f"ds_optim cannot step this layout (rank {rank}): {candidates[0][1]}")
    raise RuntimeError("the ranks disagree on the model's parameters: build the same model on every rank")


def _same_values(
    candidates: Sequence[_Candidate], numbers: Sequence[int], tensors: Sequence[Sequence[Tensor]], comms: Comms
) -> int:
    """The number of the first candidate whose master slices are the model's weights on every rank.

    Addresses alone may both be wrong. Raises as ``raise_everywhere`` where there is none.
    """
    found = [_find_other_value(c.layout, c.members, tensors, comms, lambda m: m.parameter) for c in candidates]
    everywhere = comms.all.gather_objects([fault is None for fault in found])
    for place, number in enumerate(numbers):
        if all(fits[place] for fits in everywhere):
            return number
    raise_everywhere(None if found[0] is None else RuntimeError(found[0]), comms.all)
    raise AssertionError("one rank has said what it found")


def _find_other_value(
    layout: Layout,
    members: Members,
    tensors: Sequence[Sequence[Tensor]],
    comms: Comms,
    weights: Callable[[Member], Tensor],
) -> str | None:
    """The first master slice that, cast down, is not the model's own weights."""
    for unit, unit_members, (flat,) in zip(layout.units, members, tensors, strict=True):
        for piece in unit.slices(comms.of(unit).rank):
            member = unit_members[piece.param]
            own = weights(member).detach().reshape(-1)
            start = 0 if unit.cut == "each" else piece.start
            master = flat[piece.offset : piece.offset + piece.numel]
            if not same(master, own[start : start + piece.numel]):
                return f"the master weights of {member.spec.name} are not the model's; {SYNC_HINT}"
    return None


def _work_device(comm: Comm, flat: Tensor, parameter: torch.nn.Parameter) -> torch.device:
    """Matrices are worked on where the model lives, which is not where an offloaded partition does."""
    return comm.device(parameter.device if parameter.device.type != "meta" else flat.device)
