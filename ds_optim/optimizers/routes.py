"""What each parameter got, printed once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.kinds import BIAS, STACK
from ds_optim.optimizers.route_rows import Route, change_of, folded, is_unread, rows_of
from ds_optim.optimizers.rules import Group
from ds_optim.sharding.binding import Member

if TYPE_CHECKING:
    from ds_optim.optimizers.base import ZeroOptimizer


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
    """One line for each kind of parameter: rule, rate, decay, names (layers folded into one), view or shape and why it
    is no matrix; then what deserves a warning.

    peaks: of each group's rate, where a schedule is known to lead there; else what its rate started from.
    """
    yield f"ds_optim: {type(optimizer).__name__}"
    groups = groups or optimizer.param_groups
    starts = [peak_of(group, rate) for group, rate in zip(groups, optimizer.built_rates, strict=True)]
    rows: list[Route] = []
    for group, members, lr in zip(groups, optimizer.members, peaks or starts, strict=True):
        total = sum(m.spec.numel for m in members)
        decay = float(group["weight_decay"])
        yield f"  {label_of(group)}: {group['rule']}, lr {lr:g}, decay {decay:g}, {total:,} parameters"
        own = rows_of(group["role"], members)
        yield from (f"    {row.describe()}" for row in own)
        rows += own
    if optimizer.has_aux:
        yield from warnings_of(rows, [m for members in optimizer.members for m in members])


def warnings_of(rows: Sequence[Route], members: Sequence[Member]) -> Iterator[str]:
    """A line for stacks that take the aux rule, and for each kind of matrix whose module could not be read."""
    yield from _warn_of_stacks(members)
    names = [member.spec.name for member in members]
    for row in rows:
        if is_unread(row):
            yield f"ds_optim: note: {row.describe()}: to have it cut, write {change_of(row, names)}"


def _warn_of_stacks(members: Sequence[Member]) -> Iterator[str]:
    """One line where stacked matrices take the aux rule, with the views that make matrices of them."""
    stacks = [m for m in members if m.reason == STACK]
    if not stacks:
        return
    share = sum(m.spec.numel for m in stacks) / sum(m.spec.numel for m in members)
    named = sorted({f"{folded(m.spec.name)} {'x'.join(map(str, m.spec.shape))}" for m in stacks})
    views = _views_of(stacks, [m for m in members if len(m.spec.shape) > 1 and m.reason not in (STACK, BIAS)])
    told = json.dumps(views) if views else '[{"match": "…", "batch_dims": 1}] where the first dimension counts matrices'
    yield (
        f"ds_optim: warning: {share:.0%} of the parameters look like stacks of matrices and take the aux rule "
        f'({", ".join(named)}): write "views": {told}, or name them in "matrix_exclude"'
    )


def _views_of(stacks: Sequence[Member], others: Sequence[Member]) -> list[dict[str, Any]]:
    """Views for stacked experts, whose patterns find none of ``others``; of other stacks nobody knows what they are."""
    views: dict[str, dict[str, Any]] = {}
    for name in (m.spec.name for m in stacks):
        parts = name.split(".")
        place = next((number for number in range(len(parts) - 1, -1, -1) if "expert" in parts[number]), None)
        if place is None:
            continue
        tail = re.escape(".".join(parts[place:])) + "$"
        short = rf"{re.escape(parts[place])}\." if place < len(parts) - 1 else tail
        pattern = next(
            pattern
            for pattern in (short, rf"\b{short}", tail)
            if pattern == tail or not any(re.search(pattern, other.spec.name) for other in others)
        )
        views[pattern] = {"match": pattern, "batch_dims": 1}
    return list(views.values())


def peak_of(group: Group, built: float) -> float:
    """The rate that a group's schedule leads to, as far as the group tells: a warmup has written a first one.

    built: the rate that the group was built with.
    """
    written = (group.get(key) for key in ("max_lr", "initial_lr", "lr"))  # the first two are torch's schedulers'
    return float(next(rate for rate in written if rate is not None)) or built
