"""What a rank measures while a cell of ``ds-optim memory`` trains."""

from __future__ import annotations

import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ds_optim.job.results import Moment
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.memory.measure import MemoryWatch, peak_resident_bytes, resident_bytes
from ds_optim.memory.moments import StepAccount
from ds_optim.sweep.result import HeldBytes, PeakBytes, RankMemory

#: The optimizer's state, and ZeRO-3's record of which layer comes when, exist from here on.
FIRST_STEADY_STEP = 3
SNAPSHOT = "rank{rank}.snapshot.pickle"
#: Allocations and frees that a snapshot tells the history of.
_SNAPSHOT_ENTRIES = 200_000


class MemoryObserver:
    """The peak of the first step, that of each steady one, and what is held at five moments of the last one.

    The last step's peak is not taken: counting by owner keeps what autograd saved a little longer.

    Args:
        steady: steps from ``FIRST_STEADY_STEP`` on whose peak is taken; the run's last step comes after them.
        snapshot: keep the CUDA allocator's history of the run in ``folder``.
    """

    def __init__(self, settings: TrainSettings, *, folder: Path, steady: int, snapshot: bool = False) -> None:
        self._counted_step = settings.steps
        self._steady_steps = range(FIRST_STEADY_STEP, FIRST_STEADY_STEP + steady)
        self._folder = folder
        self._snapshot = snapshot
        self._watch = MemoryWatch()
        self._step = 1
        self._vocabulary: int | None = None
        self._first: PeakBytes | None = None
        self._steady: list[PeakBytes] = []
        self._account = StepAccount(self._watch)

    def on_start(self, engine: Any) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._vocabulary = int(engine.module.config.vocab_size)
        self._watch.__enter__()
        self._account.at(engine, "init")

    def on_moment(self, engine: Any, moment: Moment) -> None:
        if self._step == self._counted_step:
            self._account.at(engine, moment)

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        peak = PeakBytes(**asdict(self._watch.peak()), resident=resident_bytes())
        if step == 1:
            self._first = peak
        elif step in self._steady_steps:
            self._steady.append(peak)
        self._step = step + 1
        if self._step == self._counted_step:
            self._account.begin(engine)
        elif step == self._counted_step:
            self._account.at(engine, "after step")
            self._watch.__exit__(None, None, None)
        self._watch.reset()

    def on_end(self, engine: Any) -> None:
        if self._snapshot:
            rank = torch.distributed.get_rank()
            torch.cuda.memory._dump_snapshot(str(self._folder / SNAPSHOT.format(rank=rank)))
            torch.cuda.memory._record_memory_history(enabled=None)

    def measured(self) -> RankMemory:
        """This rank's numbers."""
        before_step = self._account.moments["after backward"].accounted
        assert self._first is not None
        assert self._vocabulary is not None
        return RankMemory(
            host=socket.gethostname(),
            device=ranks.device().type,
            kind=self._watch.kind,
            vocabulary=self._vocabulary,
            first_step=self._first,
            steady=self._steady,
            moments={name: HeldBytes(**held.record()) for name, held in self._account.moments.items()},
            model_state_bytes=before_step.model_state_bytes,
            state_bytes=before_step.state_bytes,
            padding=before_step.state_padding + before_step.master_padding,
            rss_peak_bytes=peak_resident_bytes(),
        )
