"""The columns and plots of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_optim.bench.answers import doubt, taken, value_of
from ds_optim.bench.elementwise import EAGER, TORCH_ADAMW
from ds_optim.bench.engines import ADAMW, DEEPSPEED_MUON
from ds_optim.bench.polar import DEEPSPEED
from ds_optim.report.cells import grouped
from ds_optim.report.plots import Bars, colour_map
from ds_optim.report.schema import Row
from ds_optim.report.table import Column, TableSpec, Value
from ds_optim.report.units import fixed, milliseconds, ratio_to, significant, size, span

NOT_MEASURED = "not measured"


def _extra(key: str) -> Callable[[Row], Value]:
    return lambda row: row.extra.get(key)


def _ratio(title: str, key: str) -> Column:
    return Column(title=title, value=lambda row: row.extra.get("ratios", {}).get(key), text=significant)


def _measured(row: Row) -> Value:
    value = value_of(row)
    return NOT_MEASURED if value is None else value


def _against(title: str, text: Callable[[float], str]) -> Column:
    """What was measured, its ratio to the baseline's, and its quartiles."""
    return Column(
        title=title,
        value=_measured,
        text=text,
        compare=True,
        change=ratio_to,
        doubt=doubt,
        detail=lambda row: span(row.ms_low, row.ms_high),
    )


_OPTIMIZER = Column(title="Case", value=lambda row: row.optimizer)
_STAGE = Column(title="Stage", value=lambda row: row.stage)

STEP = TableSpec(
    columns=(
        _OPTIMIZER,
        _STAGE,
        _against(f"Time, × {ADAMW}'s", milliseconds),
        Column(title="Optimizer", value=_extra("optimizer_ms"), text=milliseconds),
        _ratio("× at the limit", f"step at the limit / {ADAMW}"),
        _ratio("/ DS Muon's", f"step / {DEEPSPEED_MUON}"),
        _ratio("Optimizer / AdamW's", f"optimizer / {ADAMW}"),
        _ratio("/ DS Muon's ", f"optimizer / {DEEPSPEED_MUON}"),
        _ratio("/ limit", "optimizer / limit"),
        Column(title="Messages under work", value=_extra("overlap"), text=lambda share: f"{100 * share:.0f} %"),
    ),
    is_baseline=lambda row: row.optimizer == ADAMW,
)

WIRE = TableSpec(
    columns=(
        _OPTIMIZER,
        _STAGE,
        _against(f"Sent/rank/step, × {ADAMW}'s", size),
        Column(title="Over AdamW", value=_extra("handed_over_adamw"), text=size),
        Column(title="Formula", value=_extra("formula"), text=size),
        Column(title="Measured / formula", value=_extra("handed_ratio"), text=lambda v: fixed(v, 4)),
        Column(title="Interface, over AdamW", value=_extra("interface_over_adamw"), text=size),
        Column(title="Interface / formula", value=_extra("interface_ratio"), text=lambda v: fixed(v, 4)),
    ),
    is_baseline=lambda row: row.optimizer == ADAMW,
)

POLAR = TableSpec(
    columns=(
        Column(title="Shape", value=_extra("shape")),
        Column(title="Routine", value=lambda row: row.optimizer),
        Column(title="Computes in", value=lambda row: row.dtype),
        _against("Time, × DeepSpeed's", milliseconds),
        _ratio("/ DS eager", "time / DeepSpeed, eager"),
        Column(title="TFLOP/s", value=_extra("tflops"), text=significant),
        _ratio("Of matrix rate", "rate / matrix rate"),
    ),
    group=lambda row: row.extra.get("shape"),
    is_baseline=lambda row: row.optimizer == DEEPSPEED,
    key_columns=3,
)

ELEMENTWISE = TableSpec(
    columns=(
        Column(title="Step", value=lambda row: row.optimizer),
        Column(title="Path", value=_extra("path")),
        _against("Time, × torch AdamW's", milliseconds),
        Column(title="B/element", value=_extra("bytes_per_element"), text=significant),
        Column(title="GB/s", value=_extra("gb_s"), text=significant),
        _ratio("Of copy", "rate / copy rate"),
        _ratio("Of in place", "rate / in-place rate"),
        _ratio("/ DS AdamW", "time / DeepSpeed AdamW"),
    ),
    group=lambda row: row.extra.get("what"),
    is_baseline=lambda row: row.optimizer == TORCH_ADAMW,
)


#: By kind what its picture shows, and what the strokes across the bars are.
_PICTURES = {
    "step_time": ("Time of a step, median and quartiles", "AdamW's, and the machine's limit for the rest"),
    "wire_bytes": ("Bytes that a rank sends in a step", "AdamW's, and the formula for the rest"),
    "polar": ("Time of an orthogonalization, median and quartiles", "at the matrix rate"),
    "elementwise": ("Time of a pass over the tensor, median and quartiles", "at the rate of a pass in place"),
}


def bars(rows: Sequence[Row]) -> Bars | None:
    """Times, or bytes on the wire, of the rows that have them, by stage, shape or kind of step; None where none has."""
    shown = [row for row in taken(rows) if value_of(row) is not None and row.extra.get("what") != "limits"]
    if not shown:
        return None
    kind = shown[0].kind
    title, limit = _PICTURES[kind]
    groups = grouped(shown, _group)
    whose = {_label(row): _whose(row) for row in shown}
    colours = colour_map(list(whose.values()))
    limits = {(name, _label(row)): found for name, of in groups.items() for row in of if (found := _limit(row, of))}
    quartiles = {
        (_group(row), _label(row)): (row.ms_low, row.ms_high)
        for row in shown
        if row.ms_low is not None and row.ms_high is not None
    }
    return Bars(
        name=kind,
        title=title,
        groups={name: [(_label(row), value_of(row)) for row in of] for name, of in groups.items()},
        text=size if kind == "wire_bytes" else milliseconds,
        parts={label: colours[optimizer] for label, optimizer in whose.items()},
        spans=quartiles,
        limits=limits,
        limit=limit,
    )


def _group(row: Row) -> str:
    return str(row.extra.get("shape" if row.kind == "polar" else "what")) if row.stage is None else f"ZeRO-{row.stage}"


def _label(row: Row) -> str:
    part = row.dtype if row.kind == "polar" else EAGER if row.extra.get("path") == EAGER else ""
    return f"{row.optimizer}, {part}" if part else row.optimizer


def _whose(row: Row) -> str:
    """The optimizer whose colour a row has: that whose step, or part of a step, it is."""
    if row.kind == "polar":
        return DEEPSPEED_MUON if row.optimizer.startswith(DEEPSPEED) else "Muon"
    if row.kind != "elementwise":
        return row.optimizer
    if ADAMW in row.optimizer:
        return ADAMW
    dtype = row.optimizer.removeprefix("sign step, ").removesuffix(" momentum")
    return f"Lion, {dtype}" if row.extra["what"] == "sign step" else "Muon"


def _limit(row: Row, group: Sequence[Row]) -> float | None:
    """What a row's time or bytes would be at the limit; None where that is not known."""
    value, ratios = value_of(row) or 0.0, row.extra.get("ratios", {})
    if row.stage is None:
        share = ratios.get("rate / matrix rate" if row.kind == "polar" else "rate / in-place rate")
        return value * share if share else None
    base = next((value_of(other) for other in group if other.optimizer == ADAMW), None)
    if base is None or row.optimizer == ADAMW:
        return None
    if row.kind == "wire_bytes":
        return base + row.extra["formula"] if row.extra.get("formula") else None
    times = ratios.get(f"step at the limit / {ADAMW}")
    return base * times if times else None
