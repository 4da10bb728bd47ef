"""What a benchmark came to, in the sentences that stand first: ratios to AdamW's, or to DeepSpeed's, and the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ds_optim.bench.elementwise import EAGER, TORCH_ADAMW
from ds_optim.bench.engines import ADAMW
from ds_optim.bench.polar import DEEPSPEED, DEEPSPEED_EAGER
from ds_optim.report.cells import grouped
from ds_optim.report.schema import Row
from ds_optim.report.units import ratio_to, significant

SPREAD = "within the spread"
#: By kind of row what is compared, and the rows that others may be held against: the first that was measured.
_BASES = {
    "step_time": (ADAMW,),
    "wire_bytes": (ADAMW,),
    "polar": (DEEPSPEED, DEEPSPEED_EAGER),
    "elementwise": (TORCH_ADAMW,),
}


def value_of(row: Row) -> float | None:
    """What a row measured: bytes, or milliseconds."""
    return row.wire_bytes_per_step if row.kind == "wire_bytes" else row.ms_per_step


def doubt(row: Row, base: Row) -> str:
    """Why two times are not told apart: their quartiles meet, or there is one sample alone. Bytes are counted."""
    if row.kind == "wire_bytes":
        return ""
    ends = row.ms_low, row.ms_high, base.ms_low, base.ms_high
    low, high, base_low, base_high = (end if end is not None else 0.0 for end in ends)
    alone = low == high or base_low == base_high
    return SPREAD if alone or (low <= base_high and base_low <= high) else ""


def base_of(rows: Sequence[Row]) -> Row | None:
    """The row that the others are held against."""
    measured = {row.optimizer: row for row in reversed(rows) if value_of(row) is not None}
    return next((measured[name] for name in _BASES[rows[0].kind] if name in measured), None)


def answers(rows: Sequence[Row]) -> list[str]:
    """A sentence for each stage, or one for all shapes; then what was not measured."""
    found = _SENTENCES[rows[0].kind](rows) if rows else []
    missing = [row for row in rows if value_of(row) is None]
    if rows and len(missing) == len(rows):
        found = [f"Nothing was measured: {rows[0].extra['not_measured']}."]
    elif missing:
        found.append(f"{len(missing)} of {len(rows)} cases were not measured; beneath the table stands why.")
    return found


def _of_stages(rows: Sequence[Row], what: str, more: Callable[[Sequence[Row]], str]) -> list[str]:
    found = []
    for stage, members in grouped(rows, lambda row: f"ZeRO-{row.stage}").items():
        base = base_of(members)
        if base is None:
            found.append(f"{stage}: {ADAMW} was not measured, and {what} has no ratio to it.")
            continue
        ratios = [f"{row.optimizer} {against(row, base)}" for row in members if row is not base and value_of(row)]
        if ratios:
            found.append(f"{stage}, {what} against {ADAMW}'s: {', '.join(ratios)}{more(members)}.")
    return found


def _steps(rows: Sequence[Row]) -> list[str]:
    return _of_stages(rows, "time of a step", lambda members: "")


def _sent(rows: Sequence[Row]) -> list[str]:
    def off_the_formula(members: Sequence[Row]) -> str:
        off = [abs(row.extra["handed_ratio"] - 1) for row in members if row.extra.get("handed_ratio")]
        return (
            f"; of ours what is beyond it is the formula's within {significant(max(0.01, 100 * max(off)), 2)} %"
            if off
            else ""
        )

    return _of_stages(rows, "bytes sent a step", off_the_formula)


def _solved(rows: Sequence[Row]) -> list[str]:
    """Of each shape the fastest of ours."""
    found = []
    for shape, members in grouped(rows, lambda row: str(row.extra.get("shape"))).items():
        base = base_of(members)
        own = [row for row in members if row.ms_per_step and row.optimizer not in _BASES["polar"]]
        if base is None or not own:
            continue
        best = min(own, key=lambda row: row.ms_per_step or 0.0)
        rate = best.extra["ratios"].get("rate / matrix rate")
        share = f", {100 * rate:.0f} % of the matrix rate" if rate else ""
        found.append(f"{shape} {against(best, base)} ({best.optimizer}, {best.dtype}{share})")
    return [f"Time of our fastest orthogonalization against DeepSpeed's: {'; '.join(found)}."] if found else []


def _passes(rows: Sequence[Row]) -> list[str]:
    """Of each sign step, by the path that is taken."""
    base = base_of(rows)
    if base is None:
        return ["torch's fused AdamW was not measured, and nothing has a ratio to it."]
    found = []
    for row in taken(rows):
        if row.extra["what"] == "sign step" and row.extra["path"] and value_of(row):
            rate = row.extra["ratios"].get("rate / in-place rate")
            share = f" ({100 * rate:.0f} % of the in-place rate)" if rate else ""
            found.append(f"{row.optimizer} {against(row, base)}{share}")
    return [f"Time of a pass against torch's fused AdamW: {'; '.join(found)}."] if found else []


def against(row: Row, base: Row) -> str:
    """The ratio of two rows, "about" so much where they are not told apart."""
    ratio = ratio_to(value_of(row) or 0.0, value_of(base) or 0.0)
    return f"about {ratio}" if doubt(row, base) else ratio


def taken(rows: Sequence[Row]) -> list[Row]:
    """Passes without the eager ones that compiled kernels stand in for."""
    compiled = {row.optimizer for row in rows if row.extra.get("path") != EAGER and value_of(row) is not None}
    return [row for row in rows if row.extra.get("path") != EAGER or row.optimizer not in compiled]


_SENTENCES: Mapping[str, Callable[[Sequence[Row]], list[str]]] = {
    "step_time": _steps,
    "wire_bytes": _sent,
    "polar": _solved,
    "elementwise": _passes,
}
