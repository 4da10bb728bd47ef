"""Rows of ``ds-optim memory`` as CSV: one line a cell, sizes in bytes, shares in percent."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_optim.machine.files import write_atomic
from ds_optim.report.schema import Row

_FORMULA = ("=", "+", "-", "@")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write merged rows; what was not measured is left empty, ``reason`` says why a cell failed."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for row in rows:
        writer.writerow([_cell(read(row)) for read in _COLUMNS.values()])
    write_atomic(path, text.getvalue())


def _cell(value: Any) -> Any:
    """A number as it is; of text, none that a spreadsheet takes for a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in _FORMULA and value.strip() else value


def _extra(*keys: str) -> Callable[[Row], Any]:
    """What stands in ``extra`` under keys within keys; None where one is missing."""

    def read(row: Row) -> Any:
        value: Any = row.extra
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def _share(what: str) -> Callable[[Row], Any]:
    def read(row: Row) -> Any:
        lines = [line for line in row.extra.get("reconciliation", ()) if line["what"] == what]
        return round(100 * lines[0]["share"], 4) if lines else None

    return read


_COLUMNS: Mapping[str, Callable[[Row], Any]] = {
    "run": lambda row: row.run,
    "optimizer": lambda row: row.optimizer,
    "momentum_dtype": lambda row: row.momentum_dtype,
    "stage": lambda row: row.stage,
    "ranks": lambda row: row.ranks,
    "dtype": lambda row: row.dtype,
    "status": lambda row: row.status,
    "reason": lambda row: row.reason,
    "parameters": _extra("parameters"),
    "state_bytes_per_param": lambda row: row.state_bytes_per_param,
    "optimizer_state_bytes": _extra("optimizer_state_bytes"),
    "model_state_bytes": lambda row: row.model_state_bytes,
    "weights": _extra("owners", "weights"),
    "gradients": _extra("owners", "gradients"),
    "master": _extra("owners", "master"),
    "buckets": _extra("owners", "buckets"),
    "peak_bytes": lambda row: row.peak_bytes,
    "peak_min": _extra("peak_spread", "min"),
    "peak_max": _extra("peak_spread", "max"),
    "peak_rank": _extra("peak_rank"),
    "first_step_peak": _extra("first_step_peak"),
    "rss_peak_bytes": lambda row: row.rss_peak_bytes,
    "saved_optimizer_state": _extra("saving", "optimizer state"),
    "saved_model_states": _extra("saving", "model states"),
    "saved_peak": _extra("saving", "peak"),
    "saved_percent_optimizer_state": _extra("saving", "percent", "optimizer state"),
    "saved_percent_model_states": _extra("saving", "percent", "model states"),
    "saved_percent_peak": _extra("saving", "percent", "peak"),
    "estimated_model_states": _extra("estimate", "model_states"),
    "estimated_peak": _extra("estimate", "peak"),
    "percent_estimated_over_accounted": _share("model states"),
    "percent_accounted_over_measured": _share("after backward"),
    "percent_estimated_peak_over_measured": _share("peak"),
}
