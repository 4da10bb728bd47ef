"""Starting the ranks of an attempt and waiting for them to end by themselves, within a bound."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from ds_optim.chaos.faults import Fault
from ds_optim.chaos.worker import ATTEMPT_FILE, work
from ds_optim.machine.child import LOG_FILE
from ds_optim.machine.forked import ForkedRanks

RANKS = 2
ATTEMPT_S = 180.0
"""An attempt without a fault, or before its fault fires, may take so long; a hang of it is a failure of the run."""


@dataclass
class Attempt:
    """What was seen of one attempt of a run, from outside and by its ranks.

    ``hung``: ranks that had to be killed. ``end_s``: seconds from the fault to the end of the last rank, stopped ones
    left aside. ``losses``: of each rank by step, as hexadecimal floats. ``lines``: what the ranks said, by rank.
    """

    statuses: list[int] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    fired: bool = False
    end_s: float = 0.0
    resumed: int | None = None
    losses: list[dict[int, str]] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def reached(self) -> int:
        """The last step that every trace of this attempt knows."""
        return max([self.resumed or 0, *(step for losses in self.losses for step in losses)])


class Awaited(Protocol):
    """Processes that a story waits for: ``poll`` gives None until there is something to tell of them."""

    def poll(self) -> Any: ...

    def end(self) -> None: ...


class ForkServer:
    """Forks ranks from one parent that has imported everything."""

    def __init__(self) -> None:
        preload = ("ds_optim.train.loop", "ds_optim.chaos.faults", "ds_optim.chaos.worker")
        self._ranks = ForkedRanks(RANKS, preload, {"OMP_NUM_THREADS": "1"})

    def start(
        self,
        folder: Path,
        settings: dict[str, Any],
        fault: Fault | None,
        bound_s: float = 0.0,
        join_s: float | None = None,
    ) -> Running:
        """Begin an attempt in ``folder``; ranks that do not end within ``bound_s`` of the fault will be killed.

        ``join_s``: how long they may take to join, where that is not the usual.
        """
        folder.mkdir(parents=True)
        record = {"settings": settings, "fault": None if fault is None else asdict(fault)}
        (folder / ATTEMPT_FILE).write_text(json.dumps(record, default=str), encoding="utf-8")
        joins = {} if join_s is None else {"DS_OPTIM_JOIN_TIMEOUT": f"{join_s:g}"}
        processes = self._ranks.start(work, lambda rank: (str(folder), joins))
        stopped = {fault.rank} if fault is not None and fault.kind == "SIGSTOP" else set()
        return Running(folder, processes, stopped, bound_s)


class Running:
    """An attempt under way; everything about processes happens in the thread that calls ``poll``."""

    def __init__(self, folder: Path, processes: list[BaseProcess], stopped: set[int], bound_s: float) -> None:
        self._folder = folder
        self._processes = processes
        self._stopped = stopped
        self._bound_s = bound_s
        self._ended: dict[int, float] = {}
        self._deadline = time.time() + ATTEMPT_S
        self._fired = False

    def poll(self) -> Attempt | None:
        """The attempt, once all its ranks ended or their time is up; None before."""
        for rank, process in enumerate(self._processes):
            if rank not in self._ended and not process.is_alive():
                self._ended[rank] = time.time()
        if not self._fired and any(b"fired" in path.read_bytes() for path in self._folder.glob("rank*.seen")):
            self._fired, self._deadline = True, time.time() + self._bound_s
        if len(self._ended.keys() | self._stopped) < len(self._processes) and time.time() < self._deadline:
            return None
        self.end()
        attempt = Attempt(hung=[rank for rank in range(RANKS) if rank not in self._ended and rank not in self._stopped])
        attempt.statuses = [int(process.exitcode or 0) for process in self._processes]
        fired = _read(attempt, self._folder)
        if fired is not None:
            attempt.fired, attempt.end_s = True, max([0.0, *(when - fired for when in self._ended.values())])
        return attempt

    def has_fired(self) -> bool:
        """Whether the fault was seen to fire."""
        return self._fired

    def end(self) -> None:
        """Leave no process behind."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()


def _read(attempt: Attempt, folder: Path) -> float | None:
    """Fill in what the ranks wrote down; when the fault fired."""
    fired = None
    for rank in range(RANKS):
        losses: dict[int, str] = {}
        path = folder / f"rank{rank}.seen"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            word, *rest = line.split()
            if word == "loss":
                losses[int(rest[0])] = rest[1]
            elif word == "sealed" and rank == 0:
                attempt.sealed.append(int(rest[0]))
            elif word == "resumed":
                attempt.resumed = int(rest[0])
            elif word == "fired":
                fired = float(rest[0])
        attempt.losses.append(losses)
        log = folder / LOG_FILE.format(rank=rank)
        attempt.lines.append(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
    return fired
