"""What a run gives back, and who may watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

#: Moments of a micro-batch, and of a save, at which an observer may look at what is held or written.
Moment = Literal["after forward", "after backward", "file written", "files written", "sealed", "latest moved"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of ``train``, the same on every rank but for ``peak_memory_bytes``.

    ``val_loss`` and ``unigram_entropy`` are in nats per token; ``losses`` are the training losses of the
    steps of this call, each the mean over the global batch; ``val_losses`` maps a step to its validation
    loss. ``peak_memory_bytes`` is this rank's: of the allocator on an accelerator, of the resident set on
    CPU. ``status`` is what ``ds-optim train`` exits with (``ds_optim.job.exits``): 0, or why the run ended early
    or without its last checkpoint.
    """

    val_loss: float
    unigram_entropy: float
    ms_per_step: float
    tokens_per_s: float
    steps: int
    parameters: int
    losses: list[float]
    val_losses: dict[int, float]
    skipped_steps: int
    peak_memory_bytes: int
    status: int = 0

    @property
    def entropy_ratio(self) -> float:
        """Validation loss over unigram entropy; below 1 the model uses context."""
        return self.val_loss / self.unigram_entropy


class Observer(Protocol):
    """Watches a run from inside, on every rank; the loop knows nothing of what it measures."""

    def on_start(self, engine: Any) -> None:
        """Called once, before the first step."""
        ...

    def on_moment(self, engine: Any, moment: Moment) -> None:
        """Called within each micro-batch, where what it takes counts into the step's ``ms``, and within a save."""
        ...

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        """Called after each step; ``step`` counts from 1, ``ms`` is forward, backward and step."""
        ...

    def on_end(self, engine: Any) -> None:
        """Called once, after the last validation."""
        ...
