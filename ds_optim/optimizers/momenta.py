"""A parameter's whole momentum as numbers, at every stage and in whatever it is stored.

DeepSpeed's ``safe_get_full_optimizer_state(p, "exp_avg")`` gives it where it is stored in fp32 or bfloat16, and raises
where it is stored in int8, whose codes stand under a name of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import BLOCK, decode
from ds_optim.elementwise.quantized import quantize
from ds_optim.errors import UserError
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.local import flat, run
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM, MOMENTUM, SCALES_OF_MOMENTUM
from ds_optim.sharding.binding import Binding
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.lines import blocks_of


def full_momentum(optimizer: Any, parameter: torch.nn.Parameter) -> Tensor | None:
    """The momentum of a parameter, put together from all ranks, which must all ask: fp32, of its whole shape, and of a
    tensor-parallel shard of the shard's.

    None for a parameter that the optimizer does not step, or whose rule keeps no momentum.

    Args:
        optimizer: one of this package's, or the DeepSpeed engine that steps it.

    Raises:
        UserError: there is no state before a first step or a load, it is another optimizer, or momentum lies in files.
    """
    own = _own(optimizer)
    binding = own.layout_now()
    place = _place(binding, parameter)
    if place is None or not _keeps_momentum(own, binding, place):
        return None
    shape = binding.layout.units[place[0]].params[place[1]].shape
    whole = torch.zeros(shape, dtype=torch.float32, device=binding.device)
    for held, state, blocks in _held(own, binding, *place):
        values = _values(state, held, blocks)
        whole.view(-1)[held.start : held.start + held.numel] = values.to(whole)
    return binding.comm_of(place[0]).all_reduce(whole)


def set_full_momentum(optimizer: Any, parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Make ``value``, of the parameter's whole shape, its momentum, rounded to the nearest that can be stored.

    Each rank takes its own slices of the ``value`` that it is given.

    Args:
        optimizer: one of this package's, or the DeepSpeed engine that steps it.

    Raises:
        UserError: as :func:`full_momentum`; the parameter has no momentum; another shape.
    """
    own = _own(optimizer)
    binding = own.layout_now()
    place = _place(binding, parameter)
    if place is None or not _keeps_momentum(own, binding, place):
        raise UserError("the optimizer keeps no momentum for this parameter: ask full_momentum first")
    spec = binding.layout.units[place[0]].params[place[1]]
    if tuple(value.shape) != spec.shape:
        raise UserError(f"{spec.name} has the shape {spec.shape} and the value {tuple(value.shape)}: give all of it")
    for held, state, blocks in _held(own, binding, *place):
        part = value.detach().reshape(-1)[held.start : held.start + held.numel]
        if CODES_OF_MOMENTUM not in state:
            run(flat(state[MOMENTUM]), held).copy_(part)
            continue
        codes, scales = quantize(part.float(), held.start)
        run(flat(state[CODES_OF_MOMENTUM]), held).copy_(codes)
        state[SCALES_OF_MOMENTUM][blocks].copy_(scales)


def _own(optimizer: Any) -> ZeroOptimizer:
    while not isinstance(optimizer, ZeroOptimizer) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, ZeroOptimizer):
        raise UserError(f"{type(optimizer).__name__} is no optimizer of ds_optim, nor an engine that steps one")
    if not optimizer.state:
        raise UserError(f"{type(optimizer).__name__} has no momentum before its first step, or a checkpoint, is done")
    return optimizer


def _place(binding: Binding, parameter: torch.nn.Parameter) -> tuple[int, int] | None:
    """The parameter's unit, and its number there."""
    for unit, members in enumerate(binding.members):
        for param, member in enumerate(members):
            if member.parameter is parameter:
                return unit, param
    return None


def _keeps_momentum(optimizer: ZeroOptimizer, binding: Binding, place: tuple[int, int]) -> bool:
    state = optimizer.state[binding.tensors[place[0]][0 if binding.sharded else place[1]]]
    if place[0] in binding.in_files and MOMENTUM in state and state[MOMENTUM].dtype == torch.float32:
        raise UserError(
            'momentum is offloaded to NVMe, and is not read from its files: offload the optimizer to "cpu" for this'
        )
    return MOMENTUM in state or CODES_OF_MOMENTUM in state


def _held(
    optimizer: ZeroOptimizer, binding: Binding, number: int, param: int
) -> Iterator[tuple[Slice, dict[str, Any], slice]]:
    """What this rank holds of a parameter: its slice, the state of the tensor that it lies in, its blocks there."""
    unit = binding.layout.units[number]
    rank = binding.comm_of(number).rank
    held = unit.slice_of(param, rank)
    if held is not None:
        first, count = blocks_of(unit, rank)[param]
        yield held, optimizer.state[binding.tensors[number][held.tensor]], slice(first, first + count)


def _values(state: dict[str, Any], held: Slice, blocks: slice) -> Tensor:
    if CODES_OF_MOMENTUM not in state:
        return run(flat(state[MOMENTUM]), held)
    codes, scales = run(flat(state[CODES_OF_MOMENTUM]), held), state[SCALES_OF_MOMENTUM][blocks]
    places = torch.arange(held.start, held.start + held.numel, dtype=torch.int64, device=codes.device) // BLOCK
    return decode(codes, scales[places - held.start // BLOCK])
