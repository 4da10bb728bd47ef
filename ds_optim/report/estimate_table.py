"""The tables of ``ds-optim estimate``: a block for each number of ranks and stage, a column for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ds_optim.memory.rank import RankMemory
from ds_optim.memory.side_by_side import EstimateRequest, EstimateRow
from ds_optim.report.blocks import Column, blocks
from ds_optim.report.units import MISSING, fixed

if TYPE_CHECKING:
    from rich.table import Table

_GIB = 2**30
_Term = tuple[str, Callable[[RankMemory], int]]
_Line = tuple[str, Callable[[EstimateRow], str]]
_STATES: tuple[_Term, ...] = (
    ("weights", lambda m: m.weights),
    ("gradients", lambda m: m.gradients + m.accumulating),
    ("master weights", lambda m: m.master),
    ("optimizer state", lambda m: m.optimizer_state),
)
_AT_PEAK = {
    "gradients": "gradients then",
    "buckets": "buckets",
    "gathered": "gathered layers",
    "logits": "logits",
    "activations": "activations",
    "step": "scratch of the step",
}
"""Of what a peak is beside weights and what the optimizer keeps: then, which may be in backward or in the step."""
_WITHOUT_PASSES = ("gradients", "buckets", "gathered", "step")
_SAVED = {"all": "saved of peak", "model_states": "saved of model states", "optimizer_state": "saved of state"}


def to_tables(rows: Sequence[EstimateRow], width: int) -> Iterator[Table]:
    """GiB of the rank that needs most, term by term, and the saving against AdamW, in lines of ``width`` characters."""
    sections = list(_sections(rows[0].request))
    labels = [[label for label, _ in section] for section in sections]
    for (ranks, stage), same in groupby(rows, key=lambda row: (row.ranks, row.estimate.zero.stage)):
        columns = [
            Column(name=_name(row), cells=[text(row) for section in sections for _, text in section]) for row in same
        ]
        yield from blocks(f"ZeRO-{stage}, {ranks:,} rank{'s' * (ranks > 1)}", labels, columns, width)


def _sections(request: EstimateRequest) -> Iterator[list[_Line]]:
    """The lines of a table, from what is held to what is saved."""
    yield [_sized(label, term) for label, term in _STATES]
    totals = [_sized("model states", lambda memory: memory.most_model_states)]
    if request.zero.offload:
        totals.append(_sized("host memory, a rank", lambda memory: memory.on_host))
        totals.append(("host memory, a node", lambda row: _gib(row.host_of_node)))
    if request.zero.nvme:
        totals.append(_sized("in files", lambda memory: memory.files))
    yield totals
    yield [_part(owner, label) for owner, label in _AT_PEAK.items() if request.has_passes or owner in _WITHOUT_PASSES]
    yield [("peak", lambda row: _gib(row.peak))]
    yield [(label, _saving(key)) for key, label in _SAVED.items()]
    if request.gpu_bytes is not None:
        largest: list[_Line] = [("largest micro-batch", lambda row: str(row.largest_batch))]
        fewest: _Line = ("fewest GPUs", lambda row: MISSING if row.fewest is None else str(row.fewest))
        yield [*(largest if request.has_passes else []), fewest]


def _part(owner: str, label: str) -> _Line:
    return label, lambda row: _gib(row.at_peak.get(owner, 0))


def _sized(label: str, term: Callable[[RankMemory], int]) -> _Line:
    return label, lambda row: _gib(term(row.estimate.largest))


def _saving(key: str) -> Callable[[EstimateRow], str]:
    return lambda row: MISSING if row.estimate is row.baseline else f"{fixed(row.saving[key], 1)} %"


def _name(row: EstimateRow) -> str:
    plan = row.estimate.optimizer
    return plan.name if plan.momentum_dtype == "float32" else f"{plan.name}\n{plan.momentum_dtype}"


def _gib(value: int) -> str:
    scaled = value / _GIB
    return "0" if value == 0 else fixed(scaled, 2) if scaled >= 0.1 else f"{scaled:.2g}"
