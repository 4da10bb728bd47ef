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


def print_routes(
    optimizer: ZeroOptimizer, groups: Sequence[Group] | None = None, peaks: Sequence[float] | None = None
) -> None:
    """Print the routes on rank 0 of the job; ``groups`` where DeepSpeed hides some of the optimizer's own."""
    say("\n".join(routes(optimizer, groups, peaks)))


def say(text: str) -> None:
    """Print on rank 0 of the job."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(text, flush=True)


def routes(
    optimizer: ZeroOptimizer, groups: Sequence[Group] | None = None, peaks: Sequence[float] | None = None
) -> Iterator[str]:
    """One line for each kind of parameter: rule, rate, decay, view, shape, names (layers folded into one).

    peaks: of each group's rate, where a schedule is known to lead there; else what its rate started from.
    """
    yield f"ds_optim: {type(optimizer).__name__}"
    groups = groups or optimizer.param_groups
    starts = [peak_of(group, rate) for group, rate in zip(groups, optimizer.built_rates, strict=True)]
    for group, members, lr in zip(groups, optimizer.members, peaks or starts, strict=True):
        total = sum(m.spec.numel for m in members)
        decay = float(group["weight_decay"])
        yield f"  {group['name']}: {group['rule']}, lr {lr:g}, decay {decay:g}, {total:,} parameters"
        kinds: dict[tuple[str, str], list[str]] = {}
        for member in members:
            seen = member.view.describe() if member.view is not None else "x".join(map(str, member.spec.shape))
            kinds.setdefault((_NUMBER.sub("*", member.spec.name), seen), []).append(member.spec.name)
        for (pattern, seen), names in kinds.items():
            count = f" ({len(names)})" if len(names) > 1 else ""
            yield f"    {pattern if len(names) > 1 else names[0]}{count}: {seen}"


def peak_of(group: Group, built: float) -> float:
    """The rate that a group's schedule leads to, as far as the group tells: a warmup has written a first one.

    built: the rate that the group was built with.
    """
    written = (group.get(key) for key in ("max_lr", "initial_lr", "lr"))  # the first two are torch's schedulers'
    return float(next(rate for rate in written if rate is not None)) or built
