"""What a user is told once, on rank 0: whose optimizer steps, and what each parameter got."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.routes import print_routes
from ds_optim.sharding.binding import Groups

_announced: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def announce_routes(
    optimizer: torch.optim.Optimizer, stepped: Groups | None = None, peaks: Sequence[float] | None = None
) -> None:
    """Print the routes of ``optimizer`` once; ``peaks``: of each group's rate, where a schedule is known.

    Not where this process has no rank yet: its first step, which passes all its groups as ``stepped``
    (DeepSpeed hides some of them then), makes up for that.
    """
    known = stepped is not None or _rank() is not None
    if known and isinstance(optimizer, ZeroOptimizer) and optimizer not in _announced:
        _announced.add(optimizer)
        print_routes(optimizer, stepped, peaks)


def announce_choice(name: str, *, ours: bool) -> None:
    """Print whose optimizer a config's type means."""
    if _rank() in (0, None):
        print(f"ds_optim: optimizer {name!r} of {'ds_optim' if ours else 'DeepSpeed or torch'}", flush=True)


def _rank() -> int | None:
    """This process's rank in the job; None before a launcher or the process group has said so."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if os.environ.get("RANK", "").isdigit() else None
