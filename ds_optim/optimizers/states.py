"""The state of an optimizer's tensors, made where no checkpoint brought it.

A value for each row of a parameter's matrices is ``state[key] = {name of the parameter: its values}``: a rank keeps
those of the rows that begin in its slice, so that each is kept once, wherever borders lie.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import wide
from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView, row_range
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM, RULES, SCALARS, SCALES_OF_MOMENTUM, STEP, Group, Rule
from ds_optim.optimizers.universal import settle_state
from ds_optim.sharding.binding import Binding
from ds_optim.sharding.layout import Unit
from ds_optim.sharding.lines import blocks_of


def init_states(
    binding: Binding,
    groups: Sequence[Group],
    states: MutableMapping[Tensor, dict[str, Any]],
    momentum_dtype: torch.dtype,
    *,
    carried: bool,
    only: int | None = None,
) -> None:
    """Make what is missing of every tensor's state; carried: a universal load brought some of it.

    All units at once: DeepSpeed links the state of all groups after the first group's step. only: of a unit that
    lies in files between steps, whose state is made when it is stepped.
    """
    for number, (unit, tensors) in enumerate(zip(binding.layout.units, binding.tensors, strict=True)):
        if (number in binding.in_files) if only is None else (number != only):
            continue
        rank = binding.comm_of(number).rank
        blocks, rule = blocks_of(unit, rank), RULES[groups[unit.group]["rule"]]
        for place, tensor in enumerate(tensors):
            params = range(len(unit.params)) if binding.sharded else [place]
            count = sum(blocks[param][1] for param in params if param in blocks)
            settle_state(states[tensor], rule, momentum_dtype, carried=carried)
            _init_tensor(states[tensor], rule, tensor, [unit.params[p].name for p in params], count, momentum_dtype)
            if rule.rows:
                views = [member.view for member in binding.members[number]]
                _init_rows(states[tensor], rule, tensor.device, unit, views, rank, params)


def _init_tensor(
    state: dict[str, Any], rule: Rule, tensor: Tensor, names: Sequence[str], blocks: int, momentum_dtype: torch.dtype
) -> None:
    """Of a tensor that holds (slices of) the parameters ``names``, in so many blocks of int8 momentum."""
    for key, dtype in rule.element_dtypes(momentum_dtype, wide(tensor.dtype)).items():
        if key not in state:
            state[key] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format).detach()
    if CODES_OF_MOMENTUM in state and SCALES_OF_MOMENTUM not in state:
        state[SCALES_OF_MOMENTUM] = torch.zeros(blocks, dtype=torch.float32, device=tensor.device)
    if rule.scalar:
        kept = state.setdefault(SCALARS, {})
        for name in names:
            kept.setdefault(name, 0.0)
    state.setdefault(STEP, 0)


def _init_rows(
    state: dict[str, Any],
    rule: Rule,
    device: torch.device,
    unit: Unit,
    views: Sequence[MatrixView | None],
    rank: int,
    params: Collection[int],
) -> None:
    """Make the rows of those of ``params`` of which a tensor holds a slice, zeros where no checkpoint brought them.

    Raises:
        UserError: a checkpoint brought another number of them.
    """
    for key in rule.rows:
        kept = state.setdefault(key, {})
        for held in unit.slices(rank):
            view = views[held.param]
            assert view is not None, f"{rule.name} keeps rows of matrices only"
            if held.param not in params:
                continue
            name = unit.params[held.param].name
            first, last = row_range(view.columns, held.start, held.numel)
            found = kept.setdefault(name, torch.zeros(last - first, dtype=torch.float32, device=device))
            if len(found) != last - first:
                raise UserError(
                    f"the checkpoint holds {len(found)} rows of {name} here, and as it is seen now there are "
                    f"{last - first}: write the views with which it was saved"
                )
