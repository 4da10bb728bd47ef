"""The way of an optimizer's state through a ZeRO-3 universal load of DeepSpeed's, which keeps less than was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.optimizers.experts import EXPERTS, SHARED_BY
from ds_optim.optimizers.rules import MOMENTUM, RULES, Group, Rule
from ds_optim.optimizers.saved import (
    PARAMETERS,
    SAVED,
    SHARE,
    UNIVERSAL_BUFFERS,
    Identity,
    description_of,
    of_this_release,
)

_NO_HYPER = ("params", PARAMETERS, SHARED_BY)


def restore_groups(groups: Sequence[Group], own: Identity) -> None:
    """After a universal load, which leaves the description in the groups, give each its own hyperparameters back.

    What somebody has set since the load stays: a value is put back only where it still is the first group's.

    Raises:
        UserError: the checkpoint holds what DeepSpeed's tool leaves behind, or is of another optimizer.
    """
    description = description_of(groups)
    assert description is not None
    check_universal(description, own)
    saved = description["groups"]
    for group, values in zip(groups, saved, strict=True):
        group.pop(SAVED, None)
        group.update(of_this_release(group))
        group.pop(SHARE, None)
        for key, first in saved[0].items():
            if key not in _NO_HYPER and key not in values and group.get(key) == first:
                group.pop(key, None)
        for key, value in values.items():
            if key not in _NO_HYPER and (key not in saved[0] or group.get(key, saved[0][key]) == saved[0][key]):
                group[key] = value


def check_universal(description: Mapping[str, Any], own: Identity) -> None:
    """Refuse a universal checkpoint that is of another optimizer, or that lacks a part of its state."""
    saved = description["groups"]
    rules = [group["rule"] for group in saved]
    if description["optimizer"] != own.optimizer or tuple(rules) != own.rules:
        raise UserError(
            f"the universal checkpoint is of {description['optimizer']} {rules} and this run's optimizer is "
            f'{own.optimizer} {list(own.rules)}: convert the original with "ds-optim reshard --optimizer"'
        )
    if any(EXPERTS in group for group in saved):
        raise UserError(
            "a universal checkpoint of experts in groups of their own is not loaded: its tool takes those of all ranks "
            "for the same. Load the original with as many ranks and the same ep_size, without load_universal"
        )
    if description["momentum_dtype"] != own.momentum_dtype:
        raise UserError(
            f"the universal checkpoint's momentum is {description['momentum_dtype']} and this optimizer's is "
            f"{own.momentum_dtype}: load it with the momentum_dtype it was saved with"
        )
    what = "the scales of its int8 momentum" if own.momentum_dtype == "int8" else None
    if any(RULES[rule].rows for rule in rules):
        what = "the values that it keeps for each row of a matrix"
    if any(RULES[rule].scalar for rule in rules):
        what = "the numbers that it keeps for each parameter"
    if what is not None:
        raise UserError(
            f"a universal checkpoint of {own.optimizer} lacks {what}, which ds_to_universal leaves behind: convert "
            'the original with "ds-optim reshard SOURCE TARGET --ranks N --stage S", and load that without '
            "load_universal"
        )


def settle_state(state: dict[str, Any], rule: Rule, momentum_dtype: torch.dtype, *, carried: bool) -> None:
    """Take out of a tensor's state what a universal load put there for buffers that the rule has not.

    carried: whether the load was of a checkpoint of this optimizer.

    Raises:
        UserError: it was of another one, whose second moment stands there.
    """
    strays = [key for key in UNIVERSAL_BUFFERS if key in state and key not in rule.element_dtypes(momentum_dtype)]
    if strays and not carried:
        raise UserError(
            f"the loaded state has {strays[0]}, which this optimizer does not keep: the checkpoint is of another "
            'optimizer; convert it with "ds-optim reshard SOURCE TARGET --optimizer ..."'
        )
    for key in strays:
        del state[key]
    if carried and rule.narrow and MOMENTUM in state:  # DeepSpeed made it fp32, which holds bfloat16 exactly
        state[MOMENTUM] = state[MOMENTUM].to(momentum_dtype)
