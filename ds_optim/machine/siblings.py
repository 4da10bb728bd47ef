"""The ranks of this node that one launcher started: it ends the others when it loses one, and does not say which."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import psutil

#: What launchers tell a rank of itself: its number, its number on the node, and how many the node has.
_NAMES = (
    ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("RANK", "LOCAL_RANK", "LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def gone(environment: Mapping[str, str]) -> list[int]:
    """Ranks of this node that have ended; none where it cannot be told which there should be."""
    for names in _NAMES:
        rank, local, here = (environment.get(name, "") for name in names)
        if rank.isdecimal() and local.isdecimal() and here.isdecimal():
            first = int(rank) - int(local)
            living = _living(names[0])
            expected = set(range(first, first + int(here)))
            # Where a node's ranks are not numbered one after the other, what is missing has no number.
            return sorted(expected - living) if int(rank) in living <= expected else []
    return []


def _living(name: str) -> set[int]:
    """The numbers of this process and of those beside it that the same parent started."""
    found = set()
    with suppress(psutil.Error):
        for process in psutil.Process(psutil.Process().ppid()).children():
            with suppress(psutil.Error, ValueError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.add(int(process.environ().get(name, "")))
    return found
