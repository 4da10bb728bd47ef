"""What an optimizer's saved state holds besides flat tensors, and its groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.matrix.views import row_range
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM, MOMENTUM, RULES, SCALARS, SCALES_OF_MOMENTUM
from ds_optim.optimizers.saved import PARAMETERS, SAVED
from ds_optim.sharding.layout import Layout, ParamSpec, Unit
from ds_optim.zero.checkpoints.portable import MASTER, Flats, SavedGroup


def saved_groups(groups: Iterable[Mapping[str, Any]], params: Sequence[Sequence[ParamSpec]]) -> list[SavedGroup]:
    """Groups of their hyperparameters.

    Raises:
        UserError: one follows a rule that this release does not know.
    """
    found = []
    for group, specs in zip(groups, params, strict=True):
        if group.get("rule") is not None and group["rule"] not in RULES:
            raise UserError(
                f"the checkpoint's rule {group['rule']!r} is none of this release of ds_optim: if a file of your own "
                "registers it, import that, or write --plugin FILE"
            )
        hyper = {key: value for key, value in group.items() if key not in ("params", SAVED, PARAMETERS)}
        found.append(SavedGroup(hyper=hyper, params=tuple(specs)))
    return found


def buffers_by_name(layout: Layout, flats: Sequence[Sequence[Sequence[Flats]]]) -> dict[str, tuple[str, ...]]:
    found = {}
    for u, unit in enumerate(layout.units):
        for param, spec in enumerate(unit.params):
            keys = flats[u][0][param if unit.cut == "none" else 0]
            found[spec.name] = tuple(key for key in keys if key not in (MASTER, SCALES_OF_MOMENTUM))
    return found


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its int8 codes as momentum: in here, scales beside it tell what it is."""
    return {MOMENTUM if key == CODES_OF_MOMENTUM else key: value for key, value in state.items()}


def as_saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse."""
    coded = SCALES_OF_MOMENTUM in state
    return {CODES_OF_MOMENTUM if coded and key == MOMENTUM else key: value for key, value in state.items()}


def plain_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same on all ranks: counts, and numbers of whole parameters."""
    return {key: float(v) if isinstance(v, Tensor) else v for key, v in entries_of(state).items()} | {
        SCALARS: state.get(SCALARS, {})
    }


def entries_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Step counts and such: neither a value for each element nor the numbers of whole parameters."""
    return {k: v for k, v in state.items() if not (isinstance(v, Mapping) or (isinstance(v, Tensor) and v.dim()))}


def rows_of(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """By key and parameter, the values that one tensor's state has of rows of matrices."""
    return {key: dict(value) for key, value in state.items() if isinstance(value, Mapping) and key != SCALARS}


def joined_rows(
    unit: Unit, states: Sequence[Sequence[Mapping[str, Any]]], folder: object
) -> dict[str, dict[str, Tensor]]:
    """The same of whole parameters, from the states by rank and by tensor of a unit.

    Raises:
        UserError: they are not as many as go with each slice.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for param, spec in enumerate(unit.params):
        holders = unit.holders(param)
        by_holder = [rows_of(states[rank][held.tensor]) for rank, held in holders]
        for key in dict.fromkeys(key for own in by_holder for key in own):
            runs = [own.get(key, {}).get(spec.name) for own in by_holder]
            if all(run is None for run in runs):
                continue
            there = [run for run in runs if isinstance(run, Tensor) and run.dim() == 1]
            rows = sum(map(len, there))
            whole = len(there) == len(runs) and rows > 0 and spec.numel % rows == 0
            places = [row_range(spec.numel // rows, h.start, h.numel) for _, h in holders] if whole else []
            if not whole or [last - first for first, last in places] != list(map(len, there)):
                raise UserError(f"{folder}: {key} of {spec.name} does not go with the slices that its ranks held")
            found.setdefault(key, {})[spec.name] = torch.cat(there)
    return found
