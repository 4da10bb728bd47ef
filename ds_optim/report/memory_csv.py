"""Rows of ``ds-optim memory`` as CSV: one line a cell, sizes in bytes, shares in percent."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_optim.machine.files import write_atomic
from ds_optim.report.schema import Row

_FORMULA = ("=", "+", "-", "@")
#: Columns, and where in a row's ``extra`` they stand; those without a place are fields of the row.
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("run", "optimizer", "momentum_dtype", "stage", "ranks", "dtype", "status", "reason"), ()),
    "parameters": ("parameters",),
    "state_bytes_per_param": (),
    "optimizer_state_bytes": ("optimizer_state_bytes",),
    "model_state_bytes": (),
    **{owner: ("owners", owner) for owner in ("weights", "gradients", "master", "buckets")},
    "peak_bytes": (),
    "peak_min": ("peak_spread", "min"),
    "peak_max": ("peak_spread", "max"),
    "peak_rank": ("peak_rank",),
    "first_step_peak": ("first_step_peak",),
    "rss_peak_bytes": (),
    "saved_optimizer_state": ("saving", "optimizer state"),
    "saved_model_states": ("saving", "model states"),
    "saved_peak": ("saving", "peak"),
    "saved_percent_optimizer_state": ("saving", "percent", "optimizer state"),
    "saved_percent_model_states": ("saving", "percent", "model states"),
    "saved_percent_peak": ("saving", "percent", "peak"),
    "estimated_model_states": ("estimate", "model_states"),
    "estimated_peak": ("estimate", "peak"),
}
#: Columns of shares by which two figures differ, and what of.
_SHARES = {
    "percent_estimated_over_accounted": "model states",
    "percent_accounted_over_measured": "after backward",
    "percent_estimated_peak_over_measured": "peak",
}
#: Of what the estimate's peak is; columns that were added since stand last.
_AT_PEAK: Mapping[str, tuple[str, ...]] = {
    f"estimated_{owner}_at_peak": ("estimate", "at_peak", owner)
    for owner in ("gradients", "activations", "logits", "gathered", "buckets", "step")
}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write merged rows; what was not measured is left empty, ``reason`` says why a cell failed."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*_COLUMNS, *_SHARES, *_AT_PEAK])
    for row in rows:
        shares = {line["what"]: round(100 * line["share"], 4) for line in row.extra.get("reconciliation", ())}
        values = [_value(row, column, keys) for column, keys in _COLUMNS.items()]
        last = (_value(row, column, keys) for column, keys in _AT_PEAK.items())
        writer.writerow(map(_cell, [*values, *map(shares.get, _SHARES.values()), *last]))
    write_atomic(path, text.getvalue())


def _value(row: Row, column: str, keys: Sequence[str]) -> Any:
    """A field of the row, or what stands in ``extra`` under keys within keys; None where one is missing."""
    value: Any = row.extra if keys else getattr(row, column)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _cell(value: Any) -> Any:
    """A number as it is; of text, none that a spreadsheet takes for a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in _FORMULA and value.strip() else value
