"""Memory that is not what the layout says: an error on every rank, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import ds_optim.zero.partitions
from ds_optim.sharding.layout import Layout, build_layout
from tests.tiers import cells

from .harness import run_ranks
from .training import ParityNet, Run, start_engine, take_step

LION_MUON = Run(type="LionMuon")


def shift_address(engine: Any, model: ParityNet, rank: int) -> None:
    """One rank's fragment of one parameter stands two elements further on."""
    if rank == 1:
        held = [p for p in model.parameters() if p._hp_mapping is not None]
        address = held[0]._hp_mapping.hp_fragment_address
        held[0]._hp_mapping.hp_fragment_address = replace(address, start=address.start + 2)


def shift_position(engine: Any, model: ParityNet, rank: int) -> None:
    """The same at stage 3, where ZeRO keeps the positions."""
    if rank == 1:
        zero = engine.optimizer
        key = zero.get_param_id(model.square.weight)
        group, offset, numel = zero.grad_position[key]
        zero.grad_position[key] = [group, offset + 2, numel]


def swap_members(engine: Any, model: ParityNet, rank: int) -> None:
    """Two matrices of one size in the wrong order, on every rank: sizes alone would not tell."""
    members = engine.basic_optimizer.members[0]
    names = [member.spec.name for member in members]
    one, other = names.index("wide.weight"), names.index("fused.weight")
    members[one], members[other] = members[other], members[one]


def wrong_closed_form(engine: Any, model: ParityNet, rank: int) -> None:
    """Another closed form, on every rank alike: the first two parameters change places."""

    def swapped(groups: Any, **how: Any) -> Layout:
        return build_layout([[*group[1::-1], *group[2:]] for group in groups], **how)

    ds_optim.zero.partitions.build_layout = swapped


def one_rank_differs(engine: Any, model: ParityNet, rank: int) -> None:
    """One rank's closed form knows another name for a parameter: nothing local is wrong with it."""
    if rank == 1:
        members = engine.basic_optimizer.members[0]
        members[0] = replace(members[0], spec=replace(members[0].spec, name="else"))


def swap_values(engine: Any, model: ParityNet, rank: int) -> None:
    """The addresses are right and the values are not: two elements of a master partition change places."""
    if rank == 1:
        zero = engine.optimizer
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        first, last = flats[0][0].item(), flats[0][1].item()
        flats[0].data[0], flats[0].data[1] = last, first


MISTAKES: dict[str, tuple[Callable[[Any, ParityNet, int], None], tuple[int, ...], str]] = {
    "shifted address": (shift_address, (1, 2), "closed form"),
    "shifted position": (shift_position, (3,), "square.weight"),
    "swapped members": (swap_members, (1, 2, 3), "closed form"),
    "wrong closed form": (wrong_closed_form, (1, 2, 3), "closed form"),
    "one rank differs": (one_rank_differs, (1, 3), "disagree"),
    "swapped values": (swap_values, (1, 2, 3), "master weights"),
}


CASES = cells(
    ((mistake, stages[-1]) for mistake, (_, stages, _) in MISTAKES.items()),
    ((mistake, stage) for mistake, (_, stages, _) in MISTAKES.items() for stage in stages),
)


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a step that must fail: the error's line, whether all weights and masters have kept
    their bits, and whether the optimizer has any state."""

    line: str
    kept: bool
    state: bool


def step_with_mistakes(rank: int, world_size: int) -> list[Seen]:
    return [_step_with_mistake(rank, world_size, *case) for case in CASES]


def _step_with_mistake(rank: int, world_size: int, mistake: str, stage: int) -> Seen:
    run = replace(LION_MUON, stage=stage)
    engine, model = start_engine(run, world_size)
    MISTAKES[mistake][0](engine, model, rank)
    optimizer = engine.basic_optimizer
    tensors = [t for group in optimizer.param_groups for t in group["params"]]
    tensors += [getattr(p, "ds_tensor", p) for p in model.parameters()]
    before = [t.detach().clone() for t in tensors]
    line = ""
    try:
        take_step(engine, run, rank, world_size, 0)
    except RuntimeError as error:
        line = str(error)
    ds_optim.zero.partitions.build_layout = build_layout
    kept = all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))
    return Seen(line, kept, any(optimizer.state.values()))


@cache
def seen() -> dict[tuple[str, int], tuple[Seen, ...]]:
    """For each case what the two ranks saw."""
    return dict(zip(CASES, zip(*run_ranks(2, step_with_mistakes), strict=True), strict=True))


@pytest.mark.parametrize(("mistake", "stage"), CASES)
def test_a_wrong_layout_is_an_error_on_every_rank_before_any_write(mistake: str, stage: int) -> None:
    first, second = seen()[mistake, stage]
    assert first == second == Seen(first.line, kept=True, state=False)
    assert MISTAKES[mistake][2] in first.line
    assert "\n" not in first.line
