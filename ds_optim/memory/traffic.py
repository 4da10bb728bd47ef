"""Bytes that a rank hands to collectives, counted where PyTorch dispatches them, and that its machine has sent.

Every collective of ``torch.distributed`` passes the dispatcher as an operator of the namespace ``c10d``, whoever
called it (DeepSpeed, an optimizer, user code). The bytes sent are those of the bandwidth-optimal algorithm (ring or
direct), as the mean over the group's N ranks: what a backend sends beyond it (gloo's and NCCL's headers, trees for
small messages) is not counted.

Interfaces count headers, and whatever else the machine sends meanwhile; what passes no network stack (shared memory,
NVLink, InfiniBand verbs) they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOPBACK = "lo"
_SENT_COLUMN = 8
TABLE = Path("/proc/net/dev")


def _all_reduce(size: int, n: int) -> float:
    return 2 * size * (n - 1) / n


def _one_way(size: int, n: int) -> float:
    return size * (n - 1) / n


# Operator: (index of the argument whose bytes count, bytes sent by a rank of n, mean over the group).
_COST: dict[str, tuple[int, Callable[[int, int], float]]] = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), (0, _all_reduce)),
    **dict.fromkeys(
        (
            *("_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
            *("broadcast_", "reduce_", "gather_"),
        ),
        (0, _one_way),
    ),
    **dict.fromkeys(
        (
            *("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"),
            *("alltoall_", "alltoall_base_", "scatter_"),
        ),
        (1, _one_way),
    ),
    "send": (0, lambda size, n: float(size)),
    **dict.fromkeys(("recv_", "recv_any_source_", "barrier"), (0, lambda size, n: 0.0)),
}


class TrafficCounter(TorchDispatchMode):
    """Counts between ``start`` and ``stop`` (or in a ``with``).

    Attributes:
        sent_bytes: bytes that this rank sent; average it over ranks for rooted and uneven collectives.
        by_operator: the same by the operator's name.
        unknown: collectives that no cost is known for; while it is not empty, ``sent_bytes`` is too low.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes = 0.0
        self.by_operator: dict[str, float] = {}
        self.unknown: set[str] = set()

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any, kwargs: Any) -> None:
        if name not in _COST:
            self.unknown.add(name)
            return
        index, cost = _COST[name]
        group = _process_group([*args, *kwargs.values()])
        if name == "alltoall_base_":
            sent = float(_off_rank_bytes(args, group))
        elif name == "alltoall_":
            own = args[1][group.rank()]
            sent = float(_bytes(args[1]) - own.numel() * own.element_size())
        else:
            sent = cost(_bytes(args[index]), group.size())
        self.sent_bytes += sent
        self.by_operator[name] = self.by_operator.get(name, 0.0) + sent


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def _off_rank_bytes(args: Any, group: Any) -> int:
    """Bytes of an ``all_to_all_single`` that leave the rank; without splits the input is cut evenly."""
    sent, splits = args[1], list(args[4])
    rows = sum(splits) if splits else group.size()
    kept = splits[group.rank()] if splits else 1
    size = sent.numel() * sent.element_size()
    return size - size * kept // rows if rows else 0


def _process_group(values: list[Any]) -> Any:
    for value in values:
        if isinstance(value, torch.ScriptObject):
            try:
                return torch.distributed.ProcessGroup.unbox(value)
            except (RuntimeError, TypeError):  # the reduce op is a script object too
                continue
    raise RuntimeError("a collective without a process group: this version of PyTorch dispatches them otherwise")


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """inside: over the loopback interface. between: over all others."""

    inside: int
    between: int

    def since(self, before: SentBytes) -> SentBytes:
        return SentBytes(inside=self.inside - before.inside, between=self.between - before.between)


def sent_bytes(table: Path = TABLE) -> SentBytes | None:
    """What this machine (or its network namespace) has sent so far; None where the system keeps no such table."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    by_name = {}
    for line in lines:
        name, colon, counters = line.partition(":")
        if colon:
            by_name[name.strip()] = int(counters.split()[_SENT_COLUMN])
    inside = by_name.pop(_LOOPBACK, 0)
    return SentBytes(inside=inside, between=sum(by_name.values()))
