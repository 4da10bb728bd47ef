"""Bytes that this machine has sent, as its network interfaces count them: inside it, and to others.

Headers are counted, and whatever else the machine sends meanwhile; what passes no network stack (shared memory, NVLink,
InfiniBand verbs) is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_LOOPBACK = "lo"
_SENT_COLUMN = 8
TABLE = Path("/proc/net/dev")


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
