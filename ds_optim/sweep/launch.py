"""The ranks of a cell on this machine: started, watched, and all of them ended when one ends badly."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ds_optim.machine.child import LOG_FILE, last_line
from ds_optim.machine.forked import ForkedRanks, end
from ds_optim.sweep.worker import FAILURE_FILE, work

_PRELOAD = ("ds_optim.train.loop", "ds_optim.sweep.measure", "ds_optim.sweep.memory_measure", "ds_optim.sweep.worker")
#: A rank that lost its peer fails with it; this long after the first one ended, the others' own reasons are read.
_SETTLE_S = 1.0
#: What a rank says when it was another rank that ended: not the reason.
_ECHOES = ("connection", "closed by peer", "timed out", "socket", " failed: ", "broken pipe")


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """What a launcher is asked to run: ``ranks`` workers on the ``cell.json`` in ``folder``."""

    folder: Path
    ranks: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """How it ended: ``reason`` is None if every rank ended well, else one line that names the rank."""

    reason: str | None
    wall_s: float


#: Runs a cell to its end, well or badly, and leaves no process behind. Another launcher (over nodes, by the deepspeed
#: launcher) starts ``python -m ds_optim.sweep.worker FOLDER`` on each rank, with RANK and WORLD_SIZE set.
CellLauncher = Callable[[CellJob], CellOutcome]


class ForkserverLauncher:
    """Runs cells on this machine; its parent process imports what ranks need from now on."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ForkedRanks(ranks, _PRELOAD)

    def prepare(self, folder: Path, optimizers: Sequence[str]) -> None:
        """Build what DeepSpeed compiles for these optimizers, once a machine; the log is in ``folder``."""
        self._ranks.build_ops(folder, optimizers)

    def __call__(self, job: CellJob) -> CellOutcome:
        begin = time.monotonic()
        processes = self._ranks.start(work, lambda rank: (str(job.folder),))
        try:
            reason = _watch(processes, job, begin + job.timeout_s)
        finally:
            end(processes)
        return CellOutcome(reason=reason, wall_s=time.monotonic() - begin)


def _watch(processes: list[BaseProcess], job: CellJob, deadline: float) -> str | None:
    """Wait until all ranks ended well (None), or one did not, or the time is up (why)."""
    running = list(processes)
    while running:
        ended = wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            late = ", ".join(p.name.removeprefix("rank") for p in running)
            return f"timed out after {job.timeout_s:g} s (rank {late} still running)"
        running = [p for p in running if p.sentinel not in ended]
        if any(p.exitcode for p in processes):
            settled = time.monotonic() + _SETTLE_S
            while time.monotonic() < settled and any(p.is_alive() for p in processes):
                time.sleep(0.02)
            codes = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
            return failure_reason(job.folder, codes)
    return None


@dataclass(frozen=True, order=True)
class Failure:
    """What a rank left of its end; first in order is the one that did not merely lose its peer."""

    echo: bool
    time: float
    rank: int
    line: str
    node: str


def failures(folder: Path, ranks: Iterable[int]) -> list[Failure]:
    """The reasons of those of the ranks that left one, the likeliest cause first."""
    found = []
    for rank in ranks:
        try:
            left = json.loads((folder / FAILURE_FILE.format(rank=rank)).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        echo = any(word in left["reason"].lower() for word in _ECHOES)
        found.append(Failure(echo, float(left["time"]), rank, str(left["reason"]), str(left.get("node", ""))))
    return sorted(found)


def failure_reason(folder: Path, exit_codes: Mapping[int, int | None]) -> str:
    """Why a cell failed, in one line: of the ranks that ended badly, the one that did not merely lose its peer.

    Args:
        folder: the cell's, where ranks left their last exception.
        exit_codes: of the ranks that ended badly; negative is a signal.
    """
    told = failures(folder, exit_codes)
    silent = next((rank for rank in exit_codes if rank not in {failure.rank for failure in told}), None)
    if silent is not None:
        last = last_line(folder / LOG_FILE.format(rank=silent))
        return f"rank {silent}: {_death(exit_codes[silent])}; last line of its log: {last}"
    return f"rank {told[0].rank}: {told[0].line}"


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
        hint = ", out of memory perhaps" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exited with status {code}"
