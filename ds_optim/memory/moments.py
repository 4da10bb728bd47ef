"""What a rank holds at five moments of a step, counted by owner and measured beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ds_optim.memory.account import MemoryAccount, account, innermost_optimizer
from ds_optim.memory.measure import MemoryWatch

#: In the order in which a run meets them. "before step" is the optimizer's call, when ZeRO has made its gradient.
MOMENTS = ("init", "after forward", "after backward", "before step", "after step")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What is held at a moment: ``accounted`` by owner, and ``measured`` by the allocator or the count of tensors."""

    accounted: MemoryAccount
    measured: int

    def record(self) -> dict[str, Any]:
        """As JSON, bytes."""
        return {"accounted": self.accounted.owners(), "total": self.accounted.total_bytes, "measured": self.measured}


class StepAccount:
    """Counts what is held over one micro-batch and step of an engine.

    ``begin`` before the forward pass, ``at`` at each moment within it; the moment before the step counts itself. The
    hooks that it sets are gone after the step.
    """

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch = watch
        self._saved: list[torch.Tensor] = []
        self._saving: saved_tensors_hooks | None = None
        self._release: Callable[[], None] = lambda: None
        self.moments: dict[str, Held] = {}

    def begin(self, engine: Any) -> None:
        """Listen to what autograd saves, and to the optimizer's call."""
        self._listen()
        optimizer = innermost_optimizer(getattr(engine, "optimizer", None))
        if optimizer is not None:
            handle = optimizer.register_step_pre_hook(lambda *_: self._before_step(engine))
            self._release = handle.remove

    def at(self, engine: Any, moment: str) -> None:
        """Count at ``moment``; of several micro-batches the last one's count stays."""
        measured = self._watch.held()
        self.moments[moment] = Held(accounted=account(engine, saved=self._saved), measured=measured)
        # What is listened to is kept alive: not in backward, which frees it.
        self._stop_listening()
        if moment == "after backward":
            self._listen()
        elif moment == "after step":
            self._release()

    def _listen(self) -> None:
        self._saving = saved_tensors_hooks(self._keep, lambda kept: kept)
        self._saving.__enter__()

    def _stop_listening(self) -> None:
        self._saved.clear()
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        # Detached: an output that its own node kept would hold itself.
        kept = tensor.detach()
        self._saved.append(kept)
        return kept

    def _before_step(self, engine: Any) -> None:
        # ZeRO calls once a group: the first call stands for the moment.
        if "before step" not in self.moments:
            self.at(engine, "before step")
