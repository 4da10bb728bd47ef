"""A sign of life of every rank in a store of their own: no collective, nothing on the path of a step.

Rank 0 serves the store. Each rank writes its pulse and reads those of the ranks it watches, in a thread of its own;
a store that stopped answering is noticed by who reads ``answered``, not by the thread that waits for it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from ds_optim.machine.meeting import Meeting
from ds_optim.survival.activity import Activity

_RUNS = itertools.count()
"""Of this process: the ranks of a program may train more than once, each time all of them."""
_STORE_TIMEOUT = timedelta(seconds=300)
# Rank 0 serves before it says where: who cannot connect soon has lost it, and nothing watches this rank yet.
_CONNECT_TIMEOUT = timedelta(seconds=10)
# Where a rank stands that waits for others, by the files and functions on its stack.
_WAITING_FILES = ("/torch/distributed/", "/deepspeed/comm/", "/ds_optim/sharding/exchange.py")
_WAITING_CALLS = ("wait", "synchronize")


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a rank says of itself: ``beat`` counts while its process lives, ``ticks`` while it gets on.

    ``reached`` counts the points that every rank comes by, so that it tells who is behind. ``failed`` is its exception
    in one line, and ``echo`` whether that is but the loss of another rank.
    """

    beat: int = 0
    ticks: int = 0
    reached: int = 0
    where: str = "start"
    waits: bool = False
    failed: str | None = None
    echo: bool = False


class Heartbeat:
    """The exchange of pulses; ``seen`` maps a rank to (its pulse, when it last changed).

    Every rank makes it once the ranks have met, and needs nothing but rank 0 for that: a rank that is lost from then on
    is known by its number, one that has not given a sign of life yet among them.

    While ``work_counts``, a process that does not wait for others and computes or reads gets on.

    Args:
        interval_s: seconds between two pulses.
        meeting: of all ranks, held.
    """

    def __init__(self, interval_s: float, meeting: Meeting) -> None:
        self.interval_s = interval_s
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.ticks, self.reached, self.at = 0, 0, "start"
        self.work_counts = True
        self.failed: str | None = None
        self.echo = False
        self.watched: list[int] = []
        self.seen: dict[int, tuple[Pulse, float]] = {}
        self.moved: dict[int, float] = {}
        self.answered = time.monotonic()
        self.broken = False
        self.verdict: str | None = None
        self._pronounced: str | None = None
        self._beat = 0
        self._activity = Activity()
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._beating: set[int] = set()
        self._store = self._open(meeting)
        self._thread = threading.Thread(target=self._run, daemon=True, name="ds_optim heartbeat")
        self.watch(range(self.world_size) if self.rank == 0 else [0])
        self._exchange()
        self._thread.start()

    def watch(self, whom: Iterable[int]) -> None:
        """Read the pulses of these ranks; one whose pulse does not come is taken to have had one until now."""
        now = time.monotonic()
        self.watched = list(whom)
        for rank in self.watched:
            self.seen.setdefault(rank, (Pulse(), now))

    def pronounce(self, line: str) -> None:
        """Tell all ranks why the run ends; on rank 0, who holds the store."""
        self._pronounced = line

    def stop(self) -> None:
        """End the thread; it is not waited for where it waits for a store that is gone."""
        self._stop.set()
        self._thread.join(timeout=2 * self.interval_s)

    def _open(self, meeting: Meeting) -> Any:
        host, name = os.environ.get("MASTER_ADDR", "127.0.0.1"), f"heartbeat/{next(_RUNS)}"
        if self.rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
            meeting.post(name, str(store.port), 0.0)
            return store
        port = int(meeting.post(name, None, _STORE_TIMEOUT.total_seconds()))
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_CONNECT_TIMEOUT)
        store.set_timeout(_STORE_TIMEOUT)
        return store

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self._exchange()
            except RuntimeError:  # torch's DistError among them
                self.broken = True
                return

    def _exchange(self) -> None:
        self._beat += 1
        where, waits = _standing(sys._current_frames().get(self._main or 0))
        if self._activity.since_last() and self.work_counts and not waits:
            self.ticks += 1
        own = Pulse(
            beat=self._beat,
            ticks=self.ticks,
            reached=self.reached,
            where=f"{self.at}, {where}",
            waits=waits,
            failed=self.failed,
            echo=self.echo,
        )
        self._store.set(f"pulse/{self.rank}", json.dumps(asdict(own)))
        if self._pronounced is not None:
            self._store.set("verdict", self._pronounced)
        if self._beat > 1:
            # What is not there yet would be waited for.
            for rank in set(self.watched) - self._beating:
                if self._store.check([f"pulse/{rank}"]):
                    self._beating.add(rank)
            there = [rank for rank in self.watched if rank in self._beating]
            texts = self._store.multi_get([f"pulse/{rank}" for rank in there]) if there else []
            for rank, text in zip(there, texts, strict=True):
                self._note(rank, Pulse(**json.loads(text)))
            if self._store.check(["verdict"]):
                self.verdict = self._store.get("verdict").decode()
        self.answered = time.monotonic()

    def _note(self, rank: int, pulse: Pulse) -> None:
        now = time.monotonic()
        before = self.seen.get(rank)
        if before is None or before[0].beat != pulse.beat:
            self.seen[rank] = (pulse, now)
        if before is None or rank not in self.moved or before[0].ticks != pulse.ticks:
            self.moved[rank] = now


def _standing(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands, and whether it waits for other ranks there."""
    if frame is None:
        return "nowhere", False
    name = f"in {frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
    waits = frame.f_code.co_name in _WAITING_CALLS
    walked: FrameType | None = frame
    while walked is not None and not waits:
        waits = any(part in walked.f_code.co_filename for part in _WAITING_FILES)
        walked = walked.f_back
    return name, waits
