"""Sums, minima and maxima over whole parameters, wherever their slices lie.

A flat partition knows no parameters: a norm taken over it is that of a random slice. Here each rank adds
up its own slices in fp64 and one small all-reduce joins the ranks, so that the result, rounded once to
fp32, does not depend on where a border cuts a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ds_optim.elementwise import fused, passes
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import Flat, read_only
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Slice, Unit

_IDENTITY = {"sum": 0.0, "min": float("inf"), "max": float("-inf")}

Partial = Callable[[Slice], Sequence[Tensor | float]]


def reduce_parameters(
    unit: Unit,
    comm: Comm,
    partial: Partial,
    *,
    columns: int,
    op: str = "sum",
    device: torch.device | None = None,
    together: bool = False,
) -> Tensor:
    """Reduce ``columns`` numbers per parameter of ``unit`` over all ranks.

    Args:
        partial: what this rank's slice contributes: ``columns`` numbers, tensors or floats, or nothing.
        op: "sum", "min" or "max"; a parameter of which no rank holds anything keeps the identity.
        device: where the collective runs (the accelerator under NCCL); default the CPU.
        together: ``partial`` only measures, by functions of ``elementwise``: a GPU may do all slices at once.

    Returns:
        (parameters, columns) in fp64 on ``device``: 8 bytes a column and parameter on the wire.
    """
    device = device or torch.device("cpu")
    with fused.together() if together else nullcontext():
        found = {held.param: values for held in unit.slices(comm.rank) if len(values := partial(held))}
    home = next((v.device for values in found.values() for v in values if isinstance(v, Tensor)), device)
    none = [torch.full((), _IDENTITY[op], dtype=torch.float64, device=home)] * columns
    # Joined where the slices lie: one copy to where the collective runs, whatever the number of parameters.
    numbers = [v for param in range(len(unit.params)) for v in found.get(param, none)]
    joined = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=home) for v in numbers])
    rows = joined.view(len(unit.params), columns).to(device)
    return comm.all_reduce(rows, op)


def square_sum(values: Flat, scratch: Scratch | None = None) -> Tensor:
    """The sum of squares of a 1-D tensor in fp64, with bounded scratch."""

    def eager(chunk: Tensor, d: Tensor) -> Tensor:
        return d.copy_(chunk).square_().sum()

    return passes.measure("square_sums", [read_only(values)], (), eager, scratch=scratch or Scratch(), narrow=0, wide=1)


def rounded_once(value: float) -> float:
    """``value`` with the 24 bits that fp32 keeps of a number, and fp64's range.

    Slices cut elsewhere add up to a sum whose last bits of fp64 differ; what is computed from it must not. A
    sum of squares may lie far outside of fp32's range.
    """
    if not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)
