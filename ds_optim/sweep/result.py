"""What the ranks of a cell leave: one record of the run, with what each rank measured."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ds_optim.job.results import TrainResult


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class RankSpeed(_Record):
    """A rank of ``ds-optim compare``: times in ms, sizes in bytes; None where it was not measured.

    ``owners``: bytes by owner as ``account`` counts them. ``node_sent_per_step``: what its node's interfaces sent, to
    itself ("inside") and to other nodes ("between").
    """

    times_ms: list[float]
    peak_bytes: int | None
    peak_kind: str
    rss_peak_bytes: int | None
    sent_bytes_per_step: float | None
    sent_by_operator: dict[str, float]
    node_sent_per_step: dict[str, float] | None
    model_state_bytes: int
    state_bytes: int
    owners: dict[str, int | dict[str, int]]


class PeakBytes(_Record):
    """``ds_optim.memory.measure.Peak`` of a step, and what was resident after it."""

    allocated: int
    active: int | None = None
    reserved: int | None = None
    outside: int | None = None
    resident: int | None = None


class HeldBytes(_Record):
    """What was held at a moment: by owner, their total, and as measured."""

    accounted: dict[str, int]
    total: int
    measured: int


class RankMemory(_Record):
    """A rank of ``ds-optim memory``; sizes in bytes."""

    host: str
    device: str
    kind: str
    vocabulary: int
    first_step: PeakBytes
    steady: list[PeakBytes]
    moments: dict[str, HeldBytes]
    model_state_bytes: int
    state_bytes: int
    padding: int
    rss_peak_bytes: int | None


class CellResult(_Record):
    """A cell that ran to its end: losses in nats per token, one of ``speed`` and ``memory`` by rank."""

    val_loss: float
    unigram_entropy: float
    losses: list[float]
    steps: int
    skipped_steps: int
    parameters: int
    nodes: list[str]
    speed: list[RankSpeed] = []
    memory: list[RankMemory] = []

    @classmethod
    def of(cls, run: TrainResult, measured: Sequence[RankSpeed | RankMemory], nodes: Sequence[str]) -> CellResult:
        """The record of a run, given what each rank measured and the node that it ran on."""
        return cls(
            val_loss=run.val_loss,
            unigram_entropy=run.unigram_entropy,
            losses=run.losses,
            steps=run.steps,
            skipped_steps=run.skipped_steps,
            parameters=run.parameters,
            nodes=list(nodes),
            speed=[rank for rank in measured if isinstance(rank, RankSpeed)],
            memory=[rank for rank in measured if isinstance(rank, RankMemory)],
        )


def largest(values: Sequence[int | None]) -> int | None:
    """The largest of what the ranks measured, of those that did."""
    return max((value for value in values if value is not None), default=None)
