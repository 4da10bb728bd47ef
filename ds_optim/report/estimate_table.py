"""The tables of ``ds-optim estimate``: a block for each number of ranks and stage, a column for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ds_optim.memory.estimate import RankMemory
from ds_optim.memory.side_by_side import EstimateRequest, EstimateRow
from ds_optim.report.units import MISSING, fixed

if TYPE_CHECKING:
    from rich.table import Table

_GIB = 2**30
_LABEL, _NUMBER, _FRAME = 26, 7, 3
"""Characters of the widest label with its frame, of a number, and of what stands around it."""
_Term = tuple[str, Callable[[RankMemory], int]]
_STATES: tuple[_Term, ...] = (
    ("weights", lambda m: m.weights),
    ("gradients", lambda m: m.gradients + m.accumulating),
    ("master weights", lambda m: m.master),
    ("optimizer state", lambda m: m.optimizer_state),
)
_MOMENTS: tuple[_Term, ...] = (
    ("buckets", lambda m: m.buckets),
    ("gathered layers", lambda m: m.gathered),
    ("scratch of the step", lambda m: m.step_gradients + m.exchange + m.chunks),
)
_SAVED = {"all": "saved of peak", "model_states": "saved of model states", "optimizer_state": "saved of state"}


def to_tables(rows: Sequence[EstimateRow], width: int) -> Iterator[Table]:
    """GiB of the rank that needs most, term by term, and the saving against AdamW.

    Args:
        width: characters of a line; optimizers that do not fit beside each other come in a table of their own.
    """
    for (ranks, stage), same in groupby(rows, key=lambda row: (row.estimate.zero.ranks, row.estimate.zero.stage)):
        for some in _beside_each_other(list(same), width - _LABEL):
            yield _table(f"ZeRO-{stage}, {ranks:,} rank{'s' * (ranks > 1)}", some)


def _beside_each_other(rows: Sequence[EstimateRow], width: int) -> Iterator[list[EstimateRow]]:
    """The rows that fit a line together, at least one."""
    some: list[EstimateRow] = []
    left = width
    for row in rows:
        column = max(_NUMBER, *map(len, _name(row).splitlines())) + _FRAME
        if some and column > left:
            yield some
            some, left = [], width
        some.append(row)
        left -= column
    yield some


def _table(title: str, rows: Sequence[EstimateRow]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(_name(row), justify="right", no_wrap=True, min_width=_NUMBER)
    for section in _sections(rows[0].request):
        for label, text in section:
            table.add_row(label, *map(text, rows))
        table.add_section()
    return table


_Line = tuple[str, Callable[[EstimateRow], str]]


def _sections(request: EstimateRequest) -> Iterator[list[_Line]]:
    """The lines of a table, from what is held to what is saved."""
    yield [_sized(label, term) for label, term in _STATES]
    totals = [_sized("model states", lambda memory: memory.most_model_states)]
    if request.zero.offload:
        totals.append(_sized("of these on the host", lambda memory: memory.host + memory.host_buckets))
    yield totals
    moments = [_sized(label, term) for label, term in _MOMENTS]
    if request.sequence_bytes:
        moments.append(("activations", lambda row: _gib(row.activations)))
    yield moments
    yield [("peak", lambda row: _gib(row.peak))]
    yield [(label, _saving(key)) for key, label in _SAVED.items()]
    if request.gpu_bytes is not None:
        largest = [("largest micro-batch", lambda row: str(row.largest_batch))] if request.sequence_bytes else []
        yield [*largest, ("fewest GPUs", lambda row: MISSING if row.fewest is None else str(row.fewest))]


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
