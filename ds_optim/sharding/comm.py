"""The few collectives that this package speaks, in one data-parallel group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A collective under way: its output may be read after ``wait()``."""

    def wait(self) -> Any: ...


class _Done:
    def wait(self) -> None:
        return None


@dataclass
class Comm:
    """Collectives over ``group``, or of one rank with itself where ``group`` is None.

    ``sent_bytes`` counts what this rank handed over for other ranks: a message to oneself is free.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    sent_bytes: int = field(default=0, compare=False)

    @staticmethod
    def of_group(group: dist.ProcessGroup | None) -> Comm:
        """The group's own ranks; None means a single process and not the world."""
        if group is None:
            return Comm()
        return Comm(dist.get_rank(group), dist.get_world_size(group), group)

    def all_to_all(self, out: Tensor, out_counts: list[int], message: Tensor, counts: list[int]) -> Pending:
        """Send ``counts[r]`` elements of the 1-D ``message`` to rank r, receive ``out_counts[r]`` from it.

        Both tensors must live until ``wait()`` of what is returned.
        """
        if self.world_size == 1:
            out.copy_(message)
            return _Done()
        self.sent_bytes += (sum(counts) - counts[self.rank]) * message.element_size()
        return dist.all_to_all_single(out, message, out_counts, counts, group=self.group, async_op=True)

    def all_gather(self, out: Tensor, values: Tensor) -> None:
        """The 1-D ``values`` of all ranks, as many on each, one behind the other."""
        if self.world_size == 1:
            out.copy_(values)
            return
        self.sent_bytes += (self.world_size - 1) * values.numel() * values.element_size()
        dist.all_gather_into_tensor(out, values, group=self.group)

    def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        """Reduce ``values`` in place over the ranks: "sum", "min" or "max"."""
        if self.world_size > 1:
            self.sent_bytes += values.numel() * values.element_size()
            dist.all_reduce(
                values,
                {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op],
                group=self.group,
            )
        return values

    def neighbours(self, size: int) -> Comm:
        """The ``size`` ranks, from a multiple of it on, that this one is among; they all call it."""
        if self.group is None:
            return Comm()
        ranks = dist.get_process_group_ranks(self.group)
        first = self.rank // size * size
        # Not all ranks of the world: each set of ranks is known to its own.
        return Comm.of_group(dist.new_group(ranks[first : first + size], use_local_synchronization=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """One small picklable object from every rank, by rank. For agreement at start, never within a step."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def device(self, fallback: torch.device) -> torch.device:
        """Where messages must live: NCCL takes none from the CPU."""
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return fallback
