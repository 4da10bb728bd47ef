"""What an optimizer saved, of whatever cut, and the :class:`Portable` that it makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.matrix.views import row_range
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM, MOMENTUM, RULES, SCALARS, SCALES_OF_MOMENTUM
from ds_optim.optimizers.saved import PARAMETERS, SAVED
from ds_optim.sharding.layout import Layout, ParamSpec, Unit
from ds_optim.zero.checkpoints.columns import Column
from ds_optim.zero.checkpoints.experts import Experts
from ds_optim.zero.checkpoints.folder import Files
from ds_optim.zero.checkpoints.portable import MASTER, Flats, Portable, SavedGroup, Shards


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the files hold of an optimizer, in the layout of the run that saved it.

    params: of each group, in its order. flats, states: ``[unit][rank][tensor]``, what has a value for each element, and
    all of the tensor's state. groups, description: as torch and this package saved them. wrapper: of DeepSpeed's.
    column, experts: as in a Portable.
    """

    layout: Layout
    params: Sequence[Sequence[ParamSpec]]
    flats: Sequence[Sequence[Sequence[Flats]]]
    states: Sequence[Sequence[Sequence[Mapping[str, Any]]]]
    groups: Sequence[Mapping[str, Any]]
    description: dict[str, Any] | None
    has_state: bool
    wrapper: dict[str, Any]
    column: Column = field(default_factory=Column)
    experts: Experts | None = None

    def portable(self, files: Files, models: Sequence[Mapping[str, Any]], prefix: str) -> Portable:
        """The checkpoint by parameter.

        Raises:
            UserError: ranks disagree, or a group follows a rule that this release does not know.
        """
        scalars: dict[str, float] = {}
        rows: dict[str, dict[str, Tensor]] = {}
        entries: dict[str, dict[str, Any]] = {}
        buffers: dict[str, tuple[str, ...]] = {}
        for unit, flats, states in zip(self.layout.units, self.flats, self.states, strict=True):
            for rank, of_rank in enumerate(states):
                if list(map(_plain_values, of_rank)) != list(map(_plain_values, states[0])):
                    number = self.column.sharing(self.groups[unit.group], len(files.optimizers))[rank]
                    raise UserError(f"{files.optimizers[number]} and the first rank's file are of different steps")
            for own in states[0]:
                scalars |= own.get(SCALARS, {})
            for key, by_name in _joined_rows(unit, states, files.folder).items():
                rows.setdefault(key, {}).update(by_name)
            for param, spec in enumerate(unit.params):
                tensor = param if unit.cut == "none" else 0
                entries[spec.name] = _entries_of(states[0][tensor])
                buffers[spec.name] = tuple(key for key in flats[0][tensor] if key not in (MASTER, SCALES_OF_MOMENTUM))
        return Portable(
            stage=self.layout.stage,
            ranks=int(models[0]["dp_world_size"]),
            groups=tuple(_saved_groups(self.groups, self.params)),
            description=self.description,
            shards=Shards(layout=self.layout, flats=self.flats),
            scalars=scalars,
            rows=rows,
            entries=entries,
            has_state=self.has_state,
            wrapper=self.wrapper,
            models=models,
            prefix=prefix,
            version=str(models[0].get("ds_version", "")),
            buffers=buffers,
            column=self.column,
            experts=self.experts,
        )


def _saved_groups(groups: Iterable[Mapping[str, Any]], params: Sequence[Sequence[ParamSpec]]) -> list[SavedGroup]:
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


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its int8 codes as momentum: in here, scales beside it tell what it is."""
    return {MOMENTUM if key == CODES_OF_MOMENTUM else key: value for key, value in state.items()}


def as_saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse."""
    coded = SCALES_OF_MOMENTUM in state
    return {CODES_OF_MOMENTUM if coded and key == MOMENTUM else key: value for key, value in state.items()}


def _plain_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same on all ranks: counts, and numbers of whole parameters."""
    return {key: float(v) if isinstance(v, Tensor) else v for key, v in _entries_of(state).items()} | {
        SCALARS: state.get(SCALARS, {})
    }


def _entries_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Step counts and such: neither a value for each element nor the numbers of whole parameters."""
    return {k: v for k, v in state.items() if not (isinstance(v, Mapping) or (isinstance(v, Tensor) and v.dim()))}


def _rows_of(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """By key and parameter, the values that one tensor's state has of rows of matrices."""
    return {key: dict(value) for key, value in state.items() if isinstance(value, Mapping) and key != SCALARS}


def _joined_rows(
    unit: Unit, states: Sequence[Sequence[Mapping[str, Any]]], folder: object
) -> dict[str, dict[str, Tensor]]:
    """The same of whole parameters, from the states by rank and by tensor of a unit.

    Raises:
        UserError: they are not as many as go with each slice.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for param, spec in enumerate(unit.params):
        holders = unit.holders(param)
        by_holder = [_rows_of(states[rank][held.tensor]) for rank, held in holders]
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
