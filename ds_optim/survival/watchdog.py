"""Ends the run on all ranks, within a bound, when one dies or hangs, with one line that names it.

- A rank that is killed breaks its peers' connections: over gloo their collective raises, and ``explain`` finds out who
  is gone, in about ``SETTLE_S`` seconds.
- Where nothing raises (NCCL; a process that is stopped), a rank without a pulse for ``LOST_S`` is named.
- A rank that lives and does not get on (a read that never returns, a deadlock) is named after ``hang_timeout``: among
  those that got least far, the one that does not itself wait for others.

In the last two cases the main thread is held in a collective, and the process is ended from the watching thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ds_optim.job.exits import RANK_LOST, RankLost
from ds_optim.machine import ranks
from ds_optim.machine.meeting import Meeting
from ds_optim.machine.said import last_words
from ds_optim.survival.heartbeat import Heartbeat

LOST_S = 30.0
"""A process without a pulse for this long is taken for dead, where the hang timeout is not shorter."""
SETTLE_S = 3.0
"""How long after a broken connection a pulse may be missing before its rank is the one that died."""
_GRACE_S = 10.0
_INTERVAL_S = 0.5


class Watchdog:
    """Watches the ranks of a run from ``start`` to ``stop``. Does nothing with ``timeout_s`` 0.

    ``note`` is told the line before a process is ended from here. Before the first step, and where there is one rank
    alone, a process that computes or reads gets on: how long that takes is for nobody to say.
    """

    def __init__(self, timeout_s: float, note: Callable[[str], None] = lambda line: None) -> None:
        self._timeout_s = timeout_s
        self._note = note
        self._lost_s = min(LOST_S, timeout_s)
        self._heart: Heartbeat | None = None
        self._stop = threading.Event()
        self._told = threading.Lock()
        self._failure_seen: float | None = None

    def start(self, meeting: Meeting) -> None:
        """The ranks are watched from here on; each of them calls it as soon as they have met."""
        if self._timeout_s == 0:
            return
        self._heart = Heartbeat(min(_INTERVAL_S, self._timeout_s / 8), meeting)
        threading.Thread(target=self._watch, daemon=True, name="ds_optim watchdog").start()

    @property
    def watching(self) -> bool:
        """Whether ``start`` came to its end."""
        return self._heart is not None

    def tick(self, where: str | None = None, *, shared: bool = True) -> None:
        """The main thread got on, and stands at ``where`` (None: still where it was).

        ``shared``: every rank makes this call as often, as it does not for files that ranks write by themselves.
        """
        if self._heart is not None:
            self._heart.ticks += 1
            self._heart.reached += shared
            self._heart.at = where or self._heart.at

    def begin_steps(self) -> None:
        """The set-up is done: from here on all ranks tick, and work alone is no progress."""
        if self._heart is not None:
            self._heart.work_counts = ranks.world_size() == 1

    def stop(self) -> None:
        """The end of a run that went well. Collective: rank 0 serves the others until the last of them is done."""
        if self._heart is not None:
            self.abandon()
            ranks.gather(None)

    def abandon(self) -> None:
        """The end of a run that did not; not collective."""
        self._stop.set()
        if self._heart is not None:
            self._heart.stop()

    def explain(self, error: BaseException) -> RankLost | None:
        """Which rank the exception of this one is due to; None where it is this one's own, which the others now hear.

        Takes up to a few seconds: a rank that died is known by the pulse that does not come.
        """
        heart = self._heart
        if heart is None:
            return None
        heart.echo = ranks.is_echo(error)
        heart.failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        heart.watch(range(heart.world_size))
        began = time.monotonic()
        while time.monotonic() < began + _GRACE_S:
            time.sleep(heart.interval_s / 2)
            if not heart.echo:
                if heart.broken or heart.answered > began + 2 * heart.interval_s:
                    return None
                continue
            line = heart.verdict or self._first_failure(heart) or self._silent(heart, SETTLE_S)
            if line is not None and self._told.acquire(blocking=False):
                return RankLost(line)
        return RankLost(f"this rank lost another one ({heart.failed})") if heart.echo else None

    def _watch(self) -> None:
        heart = self._heart
        assert heart is not None
        last = time.monotonic()
        while not self._stop.wait(heart.interval_s):
            now = time.monotonic()
            if now - last > max(5 * heart.interval_s, self._lost_s / 2):
                # This process slept (a suspended job): what it did not see says nothing about the others.
                heart.seen.clear()
                heart.moved.clear()
                heart.answered = now
            last = now
            line = heart.verdict or self._silent(heart, self._lost_s) or self._stuck(heart)
            if line is None and self._others_waited(heart):
                line = self._first_failure(heart)
            # One line is told: by the main thread, where it came out of its collective first.
            if line is not None and not self._stop.is_set() and self._told.acquire(blocking=False):
                self._end(heart, line)

    def _silent(self, heart: Heartbeat, limit_s: float) -> str | None:
        """A rank without a pulse, or rank 0 where its store is gone or does not answer."""
        now = time.monotonic()
        if heart.rank != 0 and (heart.broken or now - heart.answered > limit_s):
            return f"rank 0 died or was stopped: its heartbeat store is gone (at {heart.at})"
        for rank, (pulse, when) in sorted(heart.seen.items()):
            if rank != heart.rank and now - when > limit_s and heart.answered - when > limit_s / 2:
                return f"rank {rank} died or was stopped: no pulse for {now - when:.0f} s, last at {pulse.where}"
        return None

    def _stuck(self, heart: Heartbeat) -> str | None:
        """On rank 0, who sees all: the rank that does not get on."""
        now = time.monotonic()
        if heart.rank != 0 or len(heart.moved) < heart.world_size:
            return None
        if any(now - when <= self._timeout_s for when in heart.moved.values()):
            return None
        pulses = {rank: pulse for rank, (pulse, _) in sorted(heart.seen.items())}
        least = min(pulse.reached for pulse in pulses.values())
        behind = {rank: pulse for rank, pulse in pulses.items() if pulse.reached == least}
        named = {rank: pulse for rank, pulse in behind.items() if not pulse.waits} or behind
        places = "; ".join(f"rank {rank} at {pulse.where}" for rank, pulse in named.items())
        verb = "hangs" if len(named) == 1 else "hang"
        names = ", ".join(str(rank) for rank in named)
        return f"rank {names} {verb}: no progress for {self._timeout_s:g} s (--hang-timeout), {places}"

    def _first_failure(self, heart: Heartbeat) -> str | None:
        for rank, (pulse, _) in sorted(heart.seen.items()):
            if rank != heart.rank and pulse.failed is not None and not pulse.echo:
                return f"rank {rank} failed: {pulse.failed}"
        return None

    def _others_waited(self, heart: Heartbeat) -> bool:
        """Whether a rank failed and this one did not come out of its collective by itself in a good while."""
        failed = [pulse for _, (pulse, _) in heart.seen.items() if pulse.failed is not None]
        if not failed or heart.failed is not None:
            self._failure_seen = None
            return False
        self._failure_seen = self._failure_seen or time.monotonic()
        return time.monotonic() - self._failure_seen > _GRACE_S

    def _end(self, heart: Heartbeat, line: str) -> None:
        if heart.rank == 0:
            heart.pronounce(line)
            time.sleep(4 * heart.interval_s)
        self._note(line)
        end_process(line)


def end_process(line: str, status: int = RANK_LOST) -> NoReturn:
    """Say why and end at once: no destructor that talks to ranks that are gone."""
    last_words(f"ds-optim: error: {line}")
    sys.stdout.flush()
    os._exit(status)
