"""What a rank measures while a cell trains."""

from __future__ import annotations

from typing import Any

import torch

from ds_optim.job.results import Moment
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.memory.account import MemoryAccount, account
from ds_optim.memory.measure import MemoryWatch, peak_resident_bytes
from ds_optim.memory.traffic import SentBytes, TrafficCounter, sent_bytes
from ds_optim.sweep.cells import UNTIMED_STEPS
from ds_optim.sweep.result import RankSpeed
from ds_optim.train.sequences import parts_of


class CellObserver:
    """Times every step, and counts memory and traffic over the last two of the untimed ones.

    Two steps, because a rule of period 2 does different work in them; by then its state exists.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._times_ms: list[float] = []
        self._watch = MemoryWatch()
        self._peak_bytes: int | None = None
        self._traffic = TrafficCounter()
        self._account: MemoryAccount | None = None
        self._sent_before: SentBytes | None = None
        self._sent: SentBytes | None = None

    def on_start(self, engine: Any) -> None:
        """Nothing is measured before the first step: it makes the state."""

    def on_moment(self, engine: Any, moment: Moment) -> None:
        """Nothing is measured within a step: looking would count into its time."""

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        if step > UNTIMED_STEPS:
            self._times_ms.append(ms)
        if step == 1:
            self._traffic.start()
            self._watch.__enter__()
            self._sent_before = sent_bytes()
        elif step == UNTIMED_STEPS:
            now = sent_bytes()
            self._sent = None if now is None or self._sent_before is None else now.since(self._sent_before)
            self._peak_bytes = self._watch.peak().allocated
            self._watch.__exit__(None, None, None)
            self._traffic.stop()

    def on_end(self, engine: Any) -> None:
        """Hold gradients once more, as between ``backward`` and ``step``, and count what is held."""
        engine.train()
        engine.set_gradient_accumulation_boundary(True)
        shape = (self._settings.micro_batch, self._settings.seq_len + 1)
        windows = torch.zeros(shape, dtype=torch.long, device=ranks.device())
        engine.backward(parts_of(self._settings).losses(engine, windows).mean())
        self._account = account(engine)

    def measured(self) -> RankSpeed:
        """This rank's numbers."""
        held = self._account or MemoryAccount()
        owners = {key: getattr(held, key) for key in ("weights", "gradients", "master", "state", "buckets", "other")}
        return RankSpeed(
            times_ms=self._times_ms,
            peak_bytes=self._peak_bytes,
            peak_kind=self._watch.kind,
            rss_peak_bytes=peak_resident_bytes(),
            sent_bytes_per_step=self._traffic.sent_bytes / (UNTIMED_STEPS - 1),
            sent_by_operator=self._traffic.by_operator,
            node_sent_per_step=self._node_sent(),
            model_state_bytes=held.model_state_bytes,
            state_bytes=held.state_bytes,
            owners=owners,
        )

    def _node_sent(self) -> dict[str, float] | None:
        """Bytes that this rank's node sent in a step, to itself and to other nodes."""
        if self._sent is None:
            return None
        steps = UNTIMED_STEPS - 1
        return {"inside": self._sent.inside / steps, "between": self._sent.between / steps}
