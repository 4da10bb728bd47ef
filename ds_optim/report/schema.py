"""The one results schema: a row for each thing that was run, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_optim.errors import UserError

SCHEMA_VERSION = 1
#: The files of a run: its rows, and what it was.
RESULTS, RUN_FILE = "results.jsonl", "run.json"


class Row(BaseModel):
    """One cell of a comparison or one point of a benchmark.

    Times are milliseconds, sizes bytes, losses nats per token. None is "not measured". What only one benchmark
    knows goes into ``extra``.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = SCHEMA_VERSION
    kind: str = "compare"
    run: str = Field(default="", description="which of several runs, nodes or machines, where a report merges them")
    optimizer: str
    momentum_dtype: str = Field(default="", description="what momentum is stored in; empty or float32 for fp32")
    stage: int | None = None
    ranks: int = 1
    dtype: str = ""
    seed: int = 0
    repeat: int = 0
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = Field(default=None, description="why it failed: the last exception line and its rank")
    notes: list[str] = Field(default_factory=list)

    steps: int | None = None
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
    model_state_bytes: int | None = Field(
        default=None, description="weights, gradients, master and state; max over ranks"
    )
    peak_bytes: int | None = Field(default=None, description="most memory at once; max over ranks")
    peak_kind: str = Field(default="", description="what peak_bytes counts")
    rss_peak_bytes: int | None = None
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
    """Add one row to a results file, flushed at once, so that a run cut short keeps what it has."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.model_dump_json() + "\n")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a results file anew."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read a results file.

    Raises:
        UserError: the file is missing, or a line is no row of this schema version; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read results {path}: {error.strerror}; give a results.jsonl") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            version = fields.get("version", SCHEMA_VERSION)
            if version != SCHEMA_VERSION:
                raise UserError(f"{path} line {number} has schema version {version}; this reads {SCHEMA_VERSION}")
            rows.append(Row.model_validate(fields))
        except (json.JSONDecodeError, AttributeError, ValidationError) as error:
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            else:
                detail = str(error)
            raise UserError(f"{path} line {number} is no results row ({detail})") from error
    return rows
