"""Whether what a checkpoint says of its optimizer is true of its files: what a load asks, before there is a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.optimizers.rules import MOMENTUM, RULES, STEP, Rule
from ds_optim.optimizers.saved import PARAMETERS, check_description, described_parameters
from ds_optim.sharding.layout import ParamSpec
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.same import same


def described(portable: Portable, folder: Path) -> Portable:
    """The checkpoint with the description that a load will hold against its run.

    One that left out what was frozen at the save, as earlier releases did, is completed from the files.

    Raises:
        UserError: the description is damaged or of another optimizer's files, or a part of the state is missing.
    """
    description = portable.description
    if description is not None:
        check_description(description)
        fault = _fault_of_groups(portable, description)
        if fault is not None:
            raise UserError(f"{folder}: the description of the optimizer is not of these files ({fault})")
        groups = [
            {**own, PARAMETERS: [(spec.name, spec.shape) for spec in group.params]}
            for own, group in zip(description["groups"], portable.groups, strict=True)
        ]
        portable = replace(portable, description={**description, "groups": groups})
    for group in portable.groups if portable.has_state else ():
        rule = None if group.rule is None else RULES[group.rule]
        for spec in group.params:
            fault = None if rule is None else _fault_of_state(portable, spec.name, rule)
            if fault is not None:
                raise UserError(f"{folder}: the optimizer's state of {spec.name} is damaged ({fault})")
    return portable


def _fault_of_groups(portable: Portable, description: dict[str, Any]) -> str | None:
    if len(description["groups"]) != len(portable.groups):
        return f"it has {len(description['groups'])} groups and they {len(portable.groups)}"
    for own, group, specs in zip(
        description["groups"], portable.groups, described_parameters(description), strict=True
    ):
        hyper = {key: value for key, value in own.items() if key != PARAMETERS}
        if not same(hyper, group.hyper):
            return f"it has other hyperparameters of the group {group.hyper.get('name')!r}"
        if not _is_part(specs, group.params):
            return f"it has other parameters in the group {group.hyper.get('name')!r}"
    return None


def _is_part(some: Sequence[ParamSpec], every: Sequence[ParamSpec]) -> bool:
    """Whether the first are among the second, in their order."""
    rest = iter(every)
    return all(spec in rest for spec in some)


def _fault_of_state(portable: Portable, name: str, rule: Rule) -> str | None:
    held = portable.buffers[name]
    if portable.stage == 0 and not held:
        return None  # it never had a gradient
    missing = [key for key in rule.elements if key not in held]
    if missing:
        return f"it has no {missing[0]}"
    steps = portable.entries[name].get(STEP)
    if not isinstance(steps, (int, Tensor)) or steps < 0:
        return "it has no number of steps"
    for key in rule.rows:
        if name not in portable.rows.get(key, {}):
            return f"it has no {key}"
    if rule.scalar and not isinstance(portable.scalars.get(name), (int, float)):
        return "it has no number of the whole parameter"
    if MOMENTUM not in rule.elements:
        return None
    stored = portable.momentum_dtype(name)
    wanted = DTYPES[portable.description["momentum_dtype"]] if portable.description is not None else stored
    if rule.narrow and stored != wanted:
        return f"its momentum is {stored} and described as {wanted}"
    return "codes and scales do not go together" if portable.scaled(name) != (stored == torch.int8) else None
