"""The columns and plots of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_optim.bench.engines import ADAMW, DEEPSPEED_MUON
from ds_optim.report.plots import Bars, Plot
from ds_optim.report.schema import Row
from ds_optim.report.table import Column, TableSpec, Value
from ds_optim.report.units import fixed, milliseconds, significant, size

NOT_MEASURED = "not measured"


def _extra(key: str) -> Callable[[Row], Value]:
    return lambda row: row.extra.get(key)


def _ratio(title: str, key: str) -> Column:
    return Column(title=title, value=lambda row: row.extra.get("ratios", {}).get(key), text=significant)


def _time(row: Row) -> Value:
    return NOT_MEASURED if row.ms_per_step is None else row.ms_per_step


def _sent(row: Row) -> Value:
    return NOT_MEASURED if row.wire_bytes_per_step is None else row.wire_bytes_per_step


def _quartiles(row: Row) -> Value:
    if row.ms_low is None or row.ms_high is None:
        return None
    return f"{significant(row.ms_low)} to {significant(row.ms_high)}"


_OPTIMIZER = Column(title="Case", value=lambda row: row.optimizer)
_STAGE = Column(title="Stage", value=lambda row: row.stage)
_TIMES = (
    Column(title="Time", value=_time, text=milliseconds),
    Column(title="Quartiles (ms)", value=_quartiles),
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


def bars(name: str, title: str, rows: Sequence[Row], group: Callable[[Row], str], unit: str) -> list[Plot]:
    """Bars of the times (``unit`` "ms") or of the bytes of the rows that have them; none where no row has."""
    values = [(group(row), _label(row), row.ms_per_step if unit == "ms" else row.wire_bytes_per_step) for row in rows]
    groups: dict[str, list[tuple[str, float | None]]] = {}
    for of, label, value in values:
        if value is not None:
            groups.setdefault(of, []).append((label, value))
    return [Bars(name=name, title=title, groups=groups, text=milliseconds if unit == "ms" else size)] if groups else []


def _label(row: Row) -> str:
    """What a row is within its group of bars."""
    parts = [row.optimizer]
    if row.kind == "polar":
        parts.append(row.dtype)
    elif row.kind == "elementwise" and row.extra.get("path"):
        parts.append(row.extra["path"])
    return ", ".join(parts)


def plot_names(plot: Plot) -> list[str]:
    """The bars' labels, of which each has a colour."""
    return [label for group in plot.groups.values() for label, _ in group] if isinstance(plot, Bars) else []
