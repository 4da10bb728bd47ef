"""What an optimizer's state says of itself in a checkpoint, and its way through DeepSpeed's universal format.

Every saved group holds the same description: the optimizer, its momentum's dtype, and of all groups the
hyperparameters and the names and shapes of the parameters. A checkpoint is then read without its model, one of
another optimizer is refused, and hyperparameters find their groups again after a ZeRO-3 universal load, which
copies the first group's into all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.optimizers.costs import Costs, is_costs
from ds_optim.optimizers.experts import SHARED_BY, label_of
from ds_optim.optimizers.groups import hyper_of
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM, MOMENTUM, RULES, SCALES_OF_MOMENTUM, SECOND_MOMENT, Group, Rule
from ds_optim.optimizers.shares import RATES
from ds_optim.sharding.layout import ParamSpec

SAVED = "saved"
"""The key of the description in each saved group; no live group keeps it."""
PARAMETERS = "parameters"
COSTS = "costs"
"""The key, in the description, of what the owners of matrices were chosen by (see ``optimizers.costs``)."""
TENSOR_PARALLEL = "tensor_parallel"
"""The key, in the description, of how many ranks hold shards of parameters; not there for one."""
FORMAT = 2
UNIVERSAL_BUFFERS = (MOMENTUM, SECOND_MOMENT)
"""What ``ds_to_universal`` asks of every flat partition."""
SHARE = "lr_scale"
"""The first release kept one rate in all groups and here, of each, what it took of it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint must be of to be loaded: the class, its momentum's dtype ("float32"), and of each group the
    name, the rule and the parameters that DeepSpeed steps, as this rank holds them where so many have shards of
    them; of experts, the ranks that share them."""

    optimizer: str
    momentum_dtype: str
    names: tuple[str, ...]
    rules: tuple[str, ...]
    parameters: tuple[tuple[ParamSpec, ...], ...]
    tensor_parallel: int = 1
    sharing: tuple[tuple[int, ...], ...] = ()


def describe(identity: Identity, groups: Sequence[Group]) -> dict[str, Any]:
    """The description of ``groups``: plain numbers, strings, lists and tuples."""
    hyper = [{key: value for key, value in hyper_of(group).items() if key != SAVED} for group in groups]
    listed = [[(spec.name, spec.shape) for spec in specs] for specs in identity.parameters]
    return {
        "format": FORMAT,
        "optimizer": identity.optimizer,
        "momentum_dtype": identity.momentum_dtype,
        "groups": [
            {**own, PARAMETERS: specs, **({SHARED_BY: ranks} if ranks else {})}
            for own, specs, ranks in zip(hyper, listed, identity.sharing or [()] * len(hyper), strict=True)
        ],
        **({} if identity.tensor_parallel == 1 else {TENSOR_PARALLEL: identity.tensor_parallel}),
    }


def with_description(
    state_dict: dict[str, Any],
    identity: Identity,
    groups: Sequence[Group],
    parameters: Iterable[Tensor],
    costs: Costs | None = None,
) -> dict[str, Any]:
    """``state_dict`` of ``groups`` as it is saved: described, and with placeholders where a tensor is none of the
    model's ``parameters`` but a flat partition."""
    unsharded = {id(parameter) for parameter in parameters}
    description = {**describe(identity, groups), **({} if costs is None else {COSTS: costs})}
    states: dict[Any, dict[str, Any]] = {}
    packed = []
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        rule = RULES[group["rule"]]
        for number, tensor in zip(saved["params"], group["params"], strict=True):
            if number in state_dict["state"]:
                own = state_dict["state"][number]
                states[number] = own if id(tensor) in unsharded else with_placeholders(own, rule, tensor)
        packed.append({**hyper_of(saved), "params": saved["params"], SAVED: description})
    # In the order of the tensors, as torch numbers them.
    return {**state_dict, "state": {number: states[number] for number in sorted(states)}, "param_groups": packed}


def with_placeholders(state: Mapping[str, Any], rule: Rule, tensor: Tensor) -> dict[str, Any]:
    """State with zeros for the buffers that a rule has not: one stored value, seen as many times as it takes."""
    filled = own_state(state, rule)
    if tensor.dim() == 1:
        for key in UNIVERSAL_BUFFERS:
            filled.setdefault(key, torch.zeros(1, dtype=torch.float32, device="cpu").expand(tensor.numel()))
    return filled


def own_state(state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """A tensor's saved state without placeholders, and with the codes of int8 momentum under their own name."""
    found = {key: value for key, value in state.items() if key not in UNIVERSAL_BUFFERS or key in rule.elements}
    if SCALES_OF_MOMENTUM in found and MOMENTUM in found:
        there = found.pop(MOMENTUM)  # a placeholder, or the codes themselves, as earlier releases wrote them
        found.setdefault(CODES_OF_MOMENTUM, there)
    return found


def without_description(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is to be loaded of a saved ``state_dict``, and its description; None where an older release wrote it."""
    description = description_of(state_dict["param_groups"])
    states = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        rule = RULES.get(group.get("rule"))
        for number in group["params"]:
            if rule is not None and number in states:
                states[number] = own_state(states[number], rule)
    groups = [of_this_release(group) for group in state_dict["param_groups"]]
    plain = [{key: value for key, value in group.items() if key != SAVED} for group in groups]
    return {**state_dict, "state": states, "param_groups": plain}, description


def description_of(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = next((group[SAVED] for group in groups if SAVED in group), None)
    if found is None:
        return None
    check_description(found)
    described = [of_this_release(group) for group in found["groups"]]
    return {**found, "format": max(FORMAT, found["format"]), "groups": described}


def of_this_release(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group in which "lr" is its own rate, and layer scales are plain data, whichever release saved it."""
    share = group.get(SHARE, 1.0)
    found = {key: value * share if key in RATES else value for key, value in group.items() if key != SHARE}
    return {key: tuple(value) if isinstance(value, tuple) else value for key, value in found.items()}


def has_shares(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the first release saved these groups."""
    return any(SHARE in group for group in groups)


def check_description(description: Any) -> None:
    """Refuse a description that is none.

    Raises:
        UserError: it is damaged, or of a later release.
    """
    fault = None if isinstance(description, Mapping) else "it is no mapping"
    if fault is None:
        groups, written = description.get("groups"), description.get("format")
        if isinstance(written, int) and written > FORMAT:
            raise UserError("the checkpoint was written by a later release of ds_optim: install that one")
        for wrong, what in (
            (type(written) is not int, "no format"),
            (not isinstance(description.get("optimizer"), str), "no optimizer"),
            (description.get("momentum_dtype") not in tuple(DTYPES), "no momentum_dtype"),
            (not isinstance(groups, list) or not all(map(_is_group, groups)), "no groups of named parameters"),
            (COSTS in description and not is_costs(description[COSTS]), "no table of costs"),
        ):
            fault = f"it has {what}" if wrong and fault is None else fault
    if fault is not None:
        raise UserError(f"the description of the optimizer in the checkpoint is damaged: {fault}")


def _is_group(group: Any) -> bool:
    listed = group.get(PARAMETERS) if isinstance(group, Mapping) else None
    return isinstance(listed, list) and isinstance(group.get("rule"), str) and all(map(_is_parameter, listed))


def _is_parameter(entry: Any) -> bool:
    pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    name, shape = entry if pair else (None, None)
    return isinstance(name, str) and isinstance(shape, (tuple, list)) and all(type(size) is int for size in shape)


def check_saved(groups: Sequence[Mapping[str, Any]], description: Mapping[str, Any] | None, own: Identity) -> None:
    """Refuse the state of another optimizer, or of other parameters.

    Raises:
        UserError: nothing was loaded.
    """
    rules = tuple(group.get("rule") for group in groups)
    name = description["optimizer"] if description is not None else None
    if None in rules or name not in (None, own.optimizer) or (name is None and rules != own.rules):
        of = f"of {name}" if name else "of another optimizer"
        raise UserError(
            f"the checkpoint is {of} and this run's optimizer is {own.optimizer}: convert it with "
            f'"ds-optim reshard SOURCE TARGET --optimizer {own.optimizer}", or load it with its own optimizer'
        )
    if description is None:
        return
    there = description.get(TENSOR_PARALLEL, 1)
    if there != own.tensor_parallel:
        raise UserError(
            f"the checkpoint was saved at tensor parallel size {there} and this run has {own.tensor_parallel}: shards "
            f"are not cut anew; start with tensor parallel size {there}, or save the model's weights and begin the "
            "optimizer anew"
        )
    saved = described_parameters(description)
    if saved != own.parameters:
        raise UserError(
            f"the checkpoint's parameter groups are not this run's ({_first_difference(description, own)}): "
            "build the same model and write the same matrix_exclude, matrix_exclude_defaults, views, views_defaults "
            "and rules, or "
            f'convert it with "ds-optim reshard SOURCE TARGET --optimizer {own.optimizer} --optimizer-params ..."'
        )
    for name, group, here in zip(own.names, description["groups"], own.sharing, strict=False):
        there = tuple(group.get(SHARED_BY, ()))
        if there != here:
            raise UserError(
                f"the checkpoint's experts ({name}) were shared by other ranks than here: train with the ep_size, the "
                "ranks and the use_data_before_expert_parallelism of the run that saved it"
            )
    if rules != own.rules:
        raise UserError(
            f"the checkpoint's groups follow the rules {list(rules)} and this run's {list(own.rules)}: write the "
            "optimizer's parameters as they were, or convert the checkpoint with ds-optim reshard --optimizer"
        )


def described_parameters(description: Mapping[str, Any]) -> tuple[tuple[ParamSpec, ...], ...]:
    """Of each group the parameters that its tensors stand for."""
    return tuple(
        tuple(ParamSpec(name=name, shape=tuple(shape)) for name, shape in group[PARAMETERS])
        for group in description["groups"]
    )


def _first_difference(description: Mapping[str, Any], own: Identity) -> str:
    saved = described_parameters(description)
    there = {spec: number for number, specs in enumerate(saved) for spec in specs}
    names = [label_of(group) for group in description["groups"]]
    for number, (name, specs) in enumerate(zip(own.names, own.parameters, strict=True)):
        for spec in specs:
            if spec not in there:
                return f"{spec.name} {spec.shape} is in {name!r} here, and not there"
            if names[there[spec]] != name or (names == list(own.names) and there[spec] != number):
                return f"{spec.name} {spec.shape} is in {name!r} here and in {names[there[spec]]!r} there"
    return "it has parameters that this run has not, or another order of them"


def check_stored_dtype(saved: Mapping[str, Any], rule: Rule, wanted: torch.dtype) -> None:
    """Refuse a saved momentum that may be stored in fewer bits and was in another dtype than ``wanted``."""
    momentum = saved.get(CODES_OF_MOMENTUM, saved.get(MOMENTUM))
    if momentum is None or not rule.narrow:
        return
    dtype = momentum.dtype
    if dtype != wanted:
        raise UserError(
            f"the checkpoint's momentum is {dtype} and this optimizer's is {wanted}: load it with the momentum_dtype "
            "it was saved with"
        )
