"""Experts in groups of their own: of DeepSpeed's MoE layers each rank holds other ones than its expert-parallel peers.

Their parameters say so themselves (see ``sharding.binding.experts_of``). ZeRO shards them over fewer ranks than the
rest, in parameter groups of their own, which it knows by the ranks' name and by ``moe``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ds_optim.errors import UserError
from ds_optim.sharding.binding import experts_of

SHARED_BY = "shared by"
"""The key, in a checkpoint's description, of the ranks of the job that share a group of experts."""
EXPERTS = "moe"
"""The key by which DeepSpeed tells a group of experts, whose "name" then is that of the ranks which share them."""

Group = dict[str, Any]


def apart(groups: Sequence[Group], members: str) -> list[Group]:
    """The groups without experts, and behind them those of each name of ranks, in the order of the names.

    members: the key of a group's members.
    """
    found: list[tuple[str, Group]] = []
    for group in groups:
        by_name: dict[str, list[Any]] = {}
        for member in group[members]:
            by_name.setdefault(experts_of(member.parameter) or "", []).append(member)
        own = (
            (name, {**group, "params": [m.parameter for m in some], members: some}) for name, some in by_name.items()
        )
        found += [(name, {**part, "name": name, EXPERTS: True} if name else part) for name, part in own]
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


def marked(group: Group, parameters: Iterable[Any]) -> Group:
    """A user's group as DeepSpeed knows one of experts, if it is one.

    Raises:
        UserError: it holds other parameters too, or experts that other ranks share.
    """
    names = {experts_of(parameter) for parameter in parameters}
    if len(names) > 1:
        raise UserError(
            f"the parameter group {group['name']!r} holds experts of a DeepSpeed MoE layer beside other parameters or "
            "other ranks' experts: keep those apart that ds_optim.param_groups has put apart"
        )
    plain = {key: value for key, value in group.items() if key != EXPERTS}
    name = names.pop() if names else None
    return plain if name is None else {**plain, "name": name, EXPERTS: True}


def sharing(parameter: Any) -> tuple[int, ...]:
    """The ranks of the job among which ZeRO has cut an expert; none for other parameters, and where nothing is cut."""
    group = getattr(parameter, "_dp_group", None) or getattr(parameter, "ds_process_group", None)
    return () if experts_of(parameter) is None or group is None else tuple(dist.get_process_group_ranks(group))


def label_of(group: Mapping[str, Any], number: int | None = None) -> Any:
    """What a user is told of a group: its name, which groups of experts share; ``number`` where it has none."""
    name = group.get("name", number)
    return f"{group['role']} of {name}" if group.get(EXPERTS) else name
