"""What each parameter got, printed once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from ds_optim.optimizers.rules import Group

if TYPE_CHECKING:
    from ds_optim.optimizers.base import ZeroOptimizer

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def print_routes(optimizer: ZeroOptimizer, groups: Sequence[Group] | None = None) -> None:
    """Print the routes on rank 0 of the job; ``groups`` where DeepSpeed hides some of the optimizer's own."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print("\n".join(routes(optimizer, groups)), flush=True)


def routes(optimizer: ZeroOptimizer, groups: Sequence[Group] | None = None) -> Iterator[str]:
    """One line for each kind of parameter: rule, rate, decay, view, shape, names (layers folded into one)."""
    yield f"ds_optim: {type(optimizer).__name__}"
    for group, members in zip(groups or optimizer.param_groups, optimizer.members, strict=True):
        lr = group["lr"] * group["lr_scale"]
        total = sum(m.spec.numel for m in members)
        yield f"  {group['name']}: {group['rule']}, lr {lr:g}, decay {group['weight_decay']:g}, {total:,} parameters"
        kinds: dict[tuple[str, str], list[str]] = {}
        for member in members:
            seen = member.view.describe() if member.view is not None else "x".join(map(str, member.spec.shape))
            kinds.setdefault((_NUMBER.sub("*", member.spec.name), seen), []).append(member.spec.name)
        for (pattern, seen), names in kinds.items():
            count = f" ({len(names)})" if len(names) > 1 else ""
            yield f"    {pattern if len(names) > 1 else names[0]}{count}: {seen}"
