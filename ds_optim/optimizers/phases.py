"""A period spread over matrices: of its P steps each orthogonalizes about a P-th of them, in turns.

Each turn is a parameter group of its own, whose "phase" says at which of the P steps its matrices' turn is. So the
dearest step costs a P-th, and every matrix is orthogonalized as often as without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from ds_optim.optimizers.checks import check_period
from ds_optim.optimizers.experts import EXPERTS
from ds_optim.optimizers.routing import MATRIX, MEMBERS
from ds_optim.optimizers.rules import Group
from ds_optim.sharding.binding import Member

PHASE = "phase"


def in_phases(groups: Iterable[Group], period: float) -> Iterator[Group]:
    """Each group of matrices as up to P groups of about the same work, P being its own "period" or ``period``.

    A group with a "phase" of its own stays whole, and so do experts in groups of their own, which DeepSpeed knows
    by their names.
    """
    for group in groups:
        turns = check_period("period", group.get("period", period))
        if group["role"] != MATRIX or PHASE in group or EXPERTS in group or not math.isfinite(turns):
            yield group
            continue
        dealt = [part for part in _dealt(group[MEMBERS], int(turns)) if part]
        for phase, members in enumerate(dealt):
            own: dict[str, Any] = {"params": [m.parameter for m in members], MEMBERS: members, PHASE: phase}
            yield {**group, **own}


def _dealt(members: list[Member], turns: int) -> list[list[Member]]:
    """The dearest first, each to the turn with the least work so far; in the order of the model within a turn."""
    loads = [0.0] * turns
    turn_of = {}
    for place in sorted(range(len(members)), key=lambda place: -_work(members[place])):
        turn_of[place] = turn = loads.index(min(loads))
        loads[turn] += _work(members[place])
    return [[member for place, member in enumerate(members) if turn_of[place] == turn] for turn in range(turns)]


def _work(member: Member) -> float:
    """Of Newton-Schulz, up to a factor that all have."""
    assert member.view is not None
    return float(sum(count * m * n * min(m, n) for count, m, n in member.view.matrices()))
