"""How fast the ranks' collectives are at the sizes that a step moves."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_optim.machine import ranks

#: Bytes of a message: the sums of rules with norms, a matrix of a small model, and a share of a bucket on a CPU.
_SMALL = 1 << 10
_MIDDLE = 1 << 20
_LARGE_ON_CPU = 4 << 20
_MIB = 1 << 20
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A collective at one size: median seconds of the slowest rank, and what a rank sends meanwhile."""

    collective: str
    bytes: int
    seconds: float
    sent_bytes: float

    @property
    def mb_per_s(self) -> float:
        return self.sent_bytes / self.seconds / 1e6


def measure(bucket_bytes: int) -> list[Timed]:
    """Time all-reduce, all-gather and all-to-all; collective. ``bucket_bytes``: of one bucket of the Exchange."""
    large = bucket_bytes if ranks.device().type != "cpu" else min(bucket_bytes, _LARGE_ON_CPU)
    sizes = sorted({_SMALL, min(_MIDDLE, large), large})
    return [_time(name, run, size) for name, run in _COLLECTIVES.items() for size in sizes]


def _time(name: str, run: Callable[[torch.Tensor, torch.Tensor], None], size: int) -> Timed:
    world = ranks.world_size()
    elements = max(1, size // world) * world
    given = torch.zeros(elements, dtype=torch.uint8, device=ranks.device())
    taken = torch.empty_like(given)
    times = []
    for _ in range(_REPEATS + 1):
        _wait()
        begin = time.perf_counter()
        run(given, taken)
        _wait()
        times.append(time.perf_counter() - begin)
    # The first one makes connections.
    slowest = max(ranks.gather(statistics.median(times[1:])))
    share = (world - 1) / world * elements
    return Timed(
        collective=name, bytes=elements, seconds=slowest, sent_bytes=share * (2 if name == "all-reduce" else 1)
    )


def _wait() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def _all_reduce(given: torch.Tensor, taken: torch.Tensor) -> None:
    dist.all_reduce(given)


def _all_gather(given: torch.Tensor, taken: torch.Tensor) -> None:
    dist.all_gather_into_tensor(taken, given[: given.numel() // ranks.world_size()])


def _all_to_all(given: torch.Tensor, taken: torch.Tensor) -> None:
    dist.all_to_all_single(taken, given)


_COLLECTIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "all-to-all": _all_to_all,
}


def join_timeout(seconds: float) -> None:
    """How long DeepSpeed waits for ranks that do not come, in its own unit."""
    os.environ.setdefault("DEEPSPEED_TIMEOUT", str(max(1, round(seconds / 60))))
