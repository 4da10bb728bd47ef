"""The columns and plots of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_optim.bench.engines import ADAMW, DEEPSPEED_MUON
from ds_optim.report.plots import Bars
from ds_optim.report.schema import Row
from ds_optim.report.table import Column, TableSpec, Value
from ds_optim.report.units import fixed, milliseconds, significant, size, span

NOT_MEASURED = "not measured"


def _extra(key: str) -> Callable[[Row], Value]:
    return lambda row: row.extra.get(key)


def _ratio(title: str, key: str) -> Column:
    return Column(title=title, value=lambda row: row.extra.get("ratios", {}).get(key), text=significant)


def _time(row: Row) -> Value:
    return NOT_MEASURED if row.ms_per_step is None else row.ms_per_step


def _sent(row: Row) -> Value:
    return NOT_MEASURED if row.wire_bytes_per_step is None else row.wire_bytes_per_step


_OPTIMIZER = Column(title="Case", value=lambda row: row.optimizer)
_STAGE = Column(title="Stage", value=lambda row: row.stage)
_TIMES = (
    Column(title="Time", value=_time, text=milliseconds),
    Column(title="Quartiles (ms)", value=lambda row: span(row.ms_low, row.ms_high) or None),
)

STEP = TableSpec(
    columns=(
        _OPTIMIZER,
        _STAGE,
        *_TIMES,
        Column(title="Optimizer", value=_extra("optimizer_ms"), text=milliseconds),
        _ratio("Step / AdamW's", f"step / {ADAMW}"),
        _ratio("at the limit", f"step at the limit / {ADAMW}"),
        _ratio("/ DS Muon's", f"step / {DEEPSPEED_MUON}"),
        _ratio("Optimizer / AdamW's", f"optimizer / {ADAMW}"),
        _ratio("/ DS Muon's ", f"optimizer / {DEEPSPEED_MUON}"),
        _ratio("/ limit", "optimizer / limit"),
        Column(title="Messages under work", value=_extra("overlap"), text=lambda share: f"{100 * share:.0f} %"),
    )
)

WIRE = TableSpec(
    columns=(
        _OPTIMIZER,
        _STAGE,
        Column(title="Sent/rank/step", value=_sent, text=size),
        Column(title="Over AdamW", value=_extra("handed_over_adamw"), text=size),
        Column(title="Formula", value=_extra("formula"), text=size),
        Column(title="Measured / formula", value=_extra("handed_ratio"), text=lambda v: fixed(v, 4)),
        Column(title="Interface, over AdamW", value=_extra("interface_over_adamw"), text=size),
        Column(title="Interface / formula", value=_extra("interface_ratio"), text=lambda v: fixed(v, 4)),
    )
)

POLAR = TableSpec(
    columns=(
        Column(title="Shape", value=_extra("shape")),
        Column(title="Routine", value=lambda row: row.optimizer),
        Column(title="Computes in", value=lambda row: row.dtype),
        *_TIMES,
        _ratio("/ DS", "time / DeepSpeed"),
        _ratio("/ DS eager", "time / DeepSpeed, eager"),
        Column(title="TFLOP/s", value=_extra("tflops"), text=significant),
        _ratio("Of matrix rate", "rate / matrix rate"),
    ),
    group=lambda row: row.extra.get("shape"),
    key_columns=3,
)

ELEMENTWISE = TableSpec(
    columns=(
        Column(title="Step", value=lambda row: row.optimizer),
        Column(title="Path", value=_extra("path")),
        *_TIMES,
        Column(title="B/element", value=_extra("bytes_per_element"), text=significant),
        Column(title="GB/s", value=_extra("gb_s"), text=significant),
        _ratio("Of copy", "rate / copy rate"),
        _ratio("Of in place", "rate / in-place rate"),
        _ratio("/ AdamW", "time / torch AdamW"),
        _ratio("/ DS AdamW", "time / DeepSpeed AdamW"),
    ),
    group=lambda row: row.extra.get("what"),
)


def bars(title: str, rows: Sequence[Row]) -> Bars | None:
    """Times, or bytes on the wire, of the rows that have them, by stage, shape or kind of step; None where none has."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        value = row.wire_bytes_per_step if row.kind == "wire_bytes" else row.ms_per_step
        if value is not None:
            what = row.extra.get("shape") if row.kind == "polar" else row.extra.get("what")
            part = row.dtype if row.kind == "polar" else row.extra.get("path")
            label = f"{row.optimizer}, {part}" if part else row.optimizer
            groups.setdefault(str(what) if row.stage is None else f"ZeRO-{row.stage}", []).append((label, value))
    text = size if rows[0].kind == "wire_bytes" else milliseconds
    return Bars(name=rows[0].kind, title=title, groups=groups, text=text) if groups else None
