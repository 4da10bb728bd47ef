"""The one results schema: a row for each thing that was run, one JSON object a line."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ds_optim.errors import UserError
from ds_optim.machine.files import Unreadable, open_append, parse_json, read_bytes, short, typed, write_atomic

SCHEMA_VERSION = 1
_LIMIT = 1 << 28
_Name = Annotated[str, Field(max_length=1000)]
_Count = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Row(BaseModel):
    """One cell of a comparison or one point of a benchmark.

    Times are milliseconds, sizes bytes, losses nats per token. None is "not measured". What only one benchmark
    knows goes into ``extra``.
    """

    model_config = ConfigDict(extra="forbid")

    version: _Count = SCHEMA_VERSION
    kind: _Name = "compare"
    run: _Name = Field(default="", description="which of several runs, nodes or machines, where a report merges them")
    optimizer: _Name
    momentum_dtype: _Name = Field(default="", description="what momentum is stored in; empty or float32 for fp32")
    stage: _Count | None = None
    ranks: _Count = 1
    dtype: _Name = ""
    seed: _Count = 0
    repeat: _Count = 0
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = Field(default=None, description="why it failed: the last exception line and its rank")
    notes: list[str] = Field(default_factory=list)

    steps: _Count | None = None
    val_loss: float | None = None
    unigram_entropy: float | None = None
    train_loss: list[float] = Field(default_factory=list, description="one value a step")

    ms_per_step: float | None = Field(default=None, description="median over the timed steps, slowest rank")
    ms_low: float | None = Field(default=None, description="first quartile, or the least of the repeats")
    ms_high: float | None = Field(default=None, description="third quartile, or the most of the repeats")
    tokens_per_s: float | None = None

    state_bytes_per_param: float | None = Field(
        default=None, description="optimizer state summed over ranks, without padding, per trainable parameter"
    )
    model_state_bytes: _Count | None = Field(
        default=None, description="weights, gradients, master and state; max over ranks"
    )
    peak_bytes: _Count | None = Field(default=None, description="most memory at once; max over ranks")
    peak_kind: _Name = Field(default="", description="what peak_bytes counts")
    rss_peak_bytes: _Count | None = None
    wire_bytes_per_step: float | None = Field(default=None, description="sent by a rank, mean over ranks")

    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """The optimizer, with its momentum's dtype where that is not fp32."""
        return self.optimizer if self.momentum_dtype in ("", "float32") else f"{self.optimizer}, {self.momentum_dtype}"


class RunInfo(BaseModel):
    """What a report says about the run as a whole."""

    model_config = ConfigDict(extra="forbid")

    title: str
    command: str = ""
    started: str = Field(default="", description="date and time, UTC")
    machine: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


def append_row(path: Path, row: Row) -> None:
    """Add one row to a results file, flushed at once, so that a run cut short keeps what it has. Raises ``OSError``."""
    try:
        with open_append(path) as file:
            file.write(row.model_dump_json() + "\n")
    except Unreadable as reason:
        raise OSError(errno.EINVAL, f"{path.name} {reason}") from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a results file anew. Raises ``OSError``."""
    write_atomic(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read a results file.

    Raises:
        UserError: the file is missing, or a line is no row of this schema version; the message names the line.
    """
    try:
        lines = read_bytes(path, _LIMIT).split(b"\n")
    except Unreadable as reason:
        raise UserError(f"results {path} {reason}; give a results.jsonl") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line)
            version = fields.get("version", SCHEMA_VERSION) if isinstance(fields, dict) else SCHEMA_VERSION
            if version != SCHEMA_VERSION:
                raise UserError(
                    f"{path} line {number} has schema version {short(version, 40)}; this reads {SCHEMA_VERSION}"
                )
            rows.append(typed(fields, Row))
        except Unreadable as reason:
            why = str(reason).removeprefix("is damaged ")
            raise UserError(f"{path} line {number} is no results row {why}") from None
    return rows
