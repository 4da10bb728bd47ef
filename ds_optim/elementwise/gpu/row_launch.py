"""Slices of which some rows are measured, taken or stepped, and the launches for them: as in ``launch``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.chosen import Rows
from ds_optim.elementwise.gpu import rows
from ds_optim.elementwise.gpu.launch import OPTIONS, TYPES, Job, address, enter, key_of, on, signed, table_of
from ds_optim.elementwise.momentum import BLOCK, Bfloat16, Flat

_LANES = BLOCK // 8
_TENSORS = {"sum_rows": "mg", "gather_rows": "gm", "step_rows": "pmg"}


def take(
    name: str, tensors: Sequence[Flat | None], numbers: Sequence[Any], waiting: list[Job] | None,
    cautious: float | None = None,
) -> bool:  # fmt: skip
    """``launch.take`` for what ``gpu.rows`` has.

    sum_rows: m (n,), and the sums of all rows of the parameter, (rows,) in fp64. gather_rows: the message, m.
    step_rows: p, m, g, with rate, factor and what is kept of m. The last number is the slice's ``Rows``.
    """
    *plain, where = numbers
    job = _job(name, tensors, [*plain, *[0.0] * (rows.NUMBERS - 1 - len(plain)), cautious or 0.0], where)
    if job is None:
        return False
    enter(job, waiting)
    return True


def _job(name: str, tensors: Sequence[Flat | None], numbers: list[float], where: Rows) -> Job | None:
    given = dict(zip(_TENSORS[name], tensors, strict=True))
    p, m, g = given.get("p"), given["m"], given["g"]
    weights = p.data if isinstance(p, Bfloat16) else p
    if not isinstance(m, Tensor) or not isinstance(g, Tensor) or m.dtype != torch.float32:
        return None
    if isinstance(p, Bfloat16) and not p.writable:
        return None
    if weights is not None and (
        not isinstance(weights, Tensor) or weights.dtype not in (torch.float32, torch.bfloat16)
    ):
        return None
    all_ = [one for one in (weights, m, g, where.flags, where.before) if isinstance(one, Tensor)]
    if any(one.device != m.device or not one.is_contiguous() for one in all_):
        return None
    if g.dtype != torch.float64 and g.dtype not in TYPES:
        return None
    n, words = m.numel(), dict.fromkeys(rows.NAMES[1:], 0)
    words |= {"n": n, "start": where.start, "columns": where.columns, "rows": where.rows, "offset": where.offset}
    words |= {letter: address(one) for letter, one in (("p", weights), ("m", m), ("g", g)) if one is not None}
    if where.flags is not None and where.before is not None:
        words |= {"flags": address(where.flags), "before": address(where.before)}
    if isinstance(p, Bfloat16):
        rounding = p.rounding
        words |= {"head": rounding.start % BLOCK, "key": key_of(rounding.seed, ~rounding.stream)}
        words |= {"counter": rounding.start // BLOCK * _LANES, "step": signed(rounding.step)}
    programs = _rows_in(where, n) if name == "sum_rows" else -(-(words["head"] + n) // BLOCK)
    weights_type = None if weights is None else TYPES[weights.dtype]
    kind = name, (weights_type, TYPES.get(g.dtype), where.turned, bool(numbers[-1])), m.device
    return Job(kind, _start_rows, list(words.values()), numbers, programs if n else 0, (*tensors, *all_), None)


def _rows_in(where: Rows, n: int) -> int:
    """Programs that a slice's sums take."""
    last = where.start + n - 1
    if where.turned:
        of_matrix = where.columns * where.rows
        return (last // of_matrix - where.start // of_matrix + 1) * -(-where.rows // BLOCK)
    return last // where.columns - where.start // where.columns + 1


def constants(name: str, types: tuple[Any, ...]) -> dict[str, Any]:
    """What a kernel is compiled for."""
    weights, g, turned, cautious = types
    return {
        "sum_rows": {"turned": turned},
        "gather_rows": {"out": g, "turned": turned},
        "step_rows": {"weights": weights, "change": g, "turned": turned, "cautious": cautious},
    }[name]


def _start_rows(jobs: Sequence[Job]) -> None:
    ends = list(accumulate((job.blocks for job in jobs), initial=0))
    _start(jobs, ends)


def _start(jobs: Sequence[Job], ends: Sequence[int]) -> None:
    name, types, device = jobs[0].kind
    with on(device):
        table = table_of(jobs, ends, device)
        if ends[-1]:
            getattr(rows, name)[(ends[-1],)](table, len(jobs), **constants(name, types), **OPTIONS)
