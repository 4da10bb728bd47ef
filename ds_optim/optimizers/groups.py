"""From what a user hands to an optimizer to the groups that it steps.

Torch's contract: a group's "lr", "weight_decay", "betas" and the rest are what it steps with, whoever set them. What
stands in a group before construction wins over the constructor's arguments, which fill in what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers.checks import Check, check_at_least_zero, check_choice, check_keys, check_seed, plain
from ds_optim.optimizers.experts import EXPERTS, marked
from ds_optim.optimizers.layer_scales import check_all_match, check_layer_scales
from ds_optim.optimizers.options import aux_options
from ds_optim.optimizers.phases import in_phases
from ds_optim.optimizers.routing import AUX, FOREIGN, MATRIX, MEMBERS, ROLES, VECTOR, routed, unnamed_group
from ds_optim.optimizers.rules import FRACTION, RULES, Group
from ds_optim.sharding.binding import Member, check_plain, full_shape, is_optimized
from ds_optim.sharding.layout import ParamSpec

_STRUCTURE = ("params", "param_names", "name", "role", EXPERTS, MEMBERS)
"""What stands in a user's group and is no hyperparameter."""
_COMMON: dict[str, Check] = {
    "lr": check_at_least_zero,
    "weight_decay": check_at_least_zero,
    "initial_lr": check_at_least_zero,  # of torch's schedulers, where a run goes on
    "seed": check_seed,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a group of some role is filled in with: its rule, and that rule's hyperparameters, checked.

    ratio: of its "lr" to the optimizer's; None where that is 0 and says nothing of it.
    """

    rule: str
    lr: float
    weight_decay: float
    hyper: Mapping[str, Any]
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Built:
    """Groups without their members, which hold the model's own parameters; for each its members, and the ratio of
    the rate that it was built with to the optimizer's "lr" (None where only zeros tell)."""

    groups: list[Group]
    members: list[list[Member]]
    ratios: list[float | None]


def build_groups(
    params: Any,
    *,
    rule: str,
    lr: float,
    weight_decay: float,
    hyper: Mapping[str, Any],
    options: Mapping[str, Any],
    has_aux: bool,
    by_name: bool = False,
    spread: bool = False,
    beside: Built | None = None,
) -> Built:
    """Fill in what each group of ``params`` is stepped with. A rule without aux takes every group itself.

    spread: whether groups of matrices are cut into turns of the rule's period.
    beside: groups that the optimizer has, whose names and parameters the new ones cannot have.
    """
    there = beside or Built(groups=[], members=[], ratios=[])
    checked = {key: check(key, hyper[key]) for key, check in RULES[rule].hyper.items()}
    lr, weight_decay = check_at_least_zero("lr", lr), check_at_least_zero("weight_decay", weight_decay)
    own = Recipe(rule=rule, lr=lr, weight_decay=weight_decay, hyper=checked, ratio=1.0)
    aux = _aux_recipe(own, options) if has_aux else own
    decay_1d = bool(options.get("decay_1d", False))
    taken = {group["name"] for group in there.groups}
    routes = _given(params, needs_routes=has_aux, needs_names=by_name)
    given = list(_with_unique_names(in_phases(routes, checked["period"]) if spread else routes, taken))
    recipes = [own if group["role"] == MATRIX else aux for group in given]
    members = [
        [_for_rule(recipe.rule, member) for member in group[MEMBERS]]
        for group, recipe in zip(given, recipes, strict=True)
    ]
    seed = check_seed("seed", options.get("seed", 0))
    groups = [
        _filled(group, recipe, seed, decays=decay_1d or group["role"] != VECTOR)
        for group, recipe in zip(given, recipes, strict=True)
    ]
    _check_members([*there.groups, *groups], [*there.members, *members])
    for group in given:
        if "layer_scales" in group:
            check_all_match(check_layer_scales("layer_scales", group["layer_scales"]), chain(*members))
    ratios = [_ratio(group["lr"], recipe, lr) for group, recipe in zip(groups, recipes, strict=True)]
    return Built(groups=groups, members=members, ratios=ratios)


def _for_rule(rule: str, member: Member) -> Member:
    """The member as the rule can see it: rows are chosen by turns, so that none is left out of a turn of one row."""
    view = member.view.in_a_row if member.view is not None and FRACTION in RULES[rule].hyper else member.view
    if view == member.view:
        return member
    if not member.derived:
        raise UserError(
            f"views: {member.spec.name} has parts that take turns row by row, of which none can be chosen: leave "
            "interleave out"
        )
    return replace(member, view=view, derived=f"one matrix for rows to be chosen of: {member.derived}")


def hyper_of(group: Group) -> Group:
    """What a step reads of a group as it stands now: schedulers and users may have written tensors into it."""
    own = {key: value for key, value in group.items() if key != "params"}
    return {key: value if type(value) in (float, bool, str) else _plain(value) for key, value in own.items()}


def _plain(value: Any) -> Any:
    return tuple(plain(one) for one in value) if isinstance(value, (list, tuple)) else plain(value)


def _aux_recipe(own: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Of what is no matrix. A rule whose signs step at a part of its rate gives the same part to the aux rule."""
    rule, given = aux_options(options)
    hyper = {key: check(f"aux_{key}", given[key]) for key, check in RULES[rule].hyper.items()}
    decay = check_at_least_zero("aux_weight_decay", options.get("aux_weight_decay", own.weight_decay))
    share = own.hyper.get("sign_lr_ratio")
    if "aux_lr" in options or share is None:
        lr = check_at_least_zero("aux_lr", options.get("aux_lr", given["lr"]))
        ratio = lr / own.lr if own.lr else None
    else:
        lr, ratio = own.lr / share, 1 / share
    return Recipe(rule=rule, lr=lr, weight_decay=decay, hyper=hyper, ratio=ratio)


def _filled(group: Group, recipe: Recipe, seed: int, *, decays: bool) -> Group:
    name = f"parameter group {group['name']!r}"
    checks = {**_COMMON, **RULES[recipe.rule].hyper}
    given = {key: value for key, value in group.items() if key not in _STRUCTURE}
    check_keys(name, given, checks)
    written = {key: checks[key](f"{name}: {key}", value) for key, value in given.items()}
    kept = {key: group[key] for key in ("params", "name", "role", EXPERTS) if key in group}
    decay = recipe.weight_decay if decays else 0.0
    filled = {"lr": recipe.lr, "weight_decay": decay, "seed": seed, **recipe.hyper}
    return {**kept, "rule": recipe.rule, **filled, **written}


def _ratio(rate: float, recipe: Recipe, lr: float) -> float | None:
    if rate == recipe.lr:
        return recipe.ratio
    return rate / lr if lr else None


# -------------------------------------------------------------------------------------------- what was given


def _given(params: Any, *, needs_routes: bool, needs_names: bool) -> list[Group]:
    """Groups with their roles and members, each parameter's in the order of "params"."""
    if isinstance(params, nn.Module):
        raise UserError("the optimizer got a model: pass ds_optim.param_groups(model)")
    if isinstance(params, (torch.Tensor, Mapping, str, set)):  # a set's order is another one on each rank
        raise UserError(f"the optimizer got a {type(params).__name__}: pass ds_optim.param_groups(model)")
    items = list(params)
    if not items:
        raise UserError("the optimizer got no parameters: pass ds_optim.param_groups(model)")
    if all(isinstance(item, dict) for item in items):
        return list(_own_groups(items, needs_routes=needs_routes, needs_names=needs_names))
    if needs_routes:
        raise UserError("this optimizer asks for names and shapes of parameters: pass ds_optim.param_groups(model)")
    if needs_names and not all(isinstance(item, tuple) for item in items):
        raise UserError(
            "this optimizer asks for names of parameters: pass ds_optim.param_groups(model) or model.named_parameters()"
        )
    return unnamed_group(items)


def _own_groups(items: Sequence[Group], *, needs_routes: bool, needs_names: bool) -> Iterator[Group]:
    """Groups that a user wrote, or split: members follow their parameters, whichever group brought them."""
    known = {id(member.parameter): member for group in items for member in group.get(MEMBERS, ())}
    count = 0
    for number, group in enumerate(items):
        params = group.get("params", ())
        if isinstance(params, (set, str)) or not isinstance(params, Iterable):
            raise UserError(f"the params of parameter group {group.get('name', number)!r} are no list of parameters")
        carried = {id(member.parameter) for member in group.get(MEMBERS, ())}
        members = []
        for item in [params] if isinstance(params, torch.Tensor) else list(params):
            name, parameter = item if isinstance(item, tuple) else (None, item)
            if not isinstance(parameter, torch.Tensor):
                raise UserError(FOREIGN)
            member = known.get(id(parameter)) or routed(parameter)
            if member is None and (needs_routes or (needs_names and name is None)):
                raise UserError(FOREIGN)
            if member is None:
                member = Member(
                    ParamSpec(name=name or f"parameter {count}", shape=full_shape(parameter)),  # type: ignore[arg-type]
                    parameter,  # type: ignore[arg-type]
                )
            count += 1
            if id(parameter) in carried or is_optimized(member.parameter):
                members.append(member)
        if not members:
            raise UserError(f"parameter group {group.get('name', number)!r} has no trainable parameter: leave it out")
        role = _role(group, members, needs_routes=needs_routes)
        name = group.get("name", role)
        if not isinstance(name, str):
            raise UserError(f"the name of parameter group {number} is {name!r}: write a string")
        own = {**group, "params": [m.parameter for m in members], "name": name, "role": role, MEMBERS: members}
        yield marked(own, own["params"])


def _role(group: Group, members: Iterable[Member], *, needs_routes: bool) -> str:
    """What a user's group holds. One with a tensor of two dimensions decays as a whole."""
    if "role" in group:
        role = check_choice("the role of a parameter group", group["role"], ROLES)
    else:
        roles = {_role_of(member) for member in members}
        if len(roles) > 1 and MATRIX in roles and needs_routes:
            raise UserError(
                "a parameter group holds matrices and others, which step by different rules: keep those apart that "
                "ds_optim.param_groups has put apart"
            )
        role = roles.pop() if len(roles) == 1 else AUX
    if role == MATRIX and needs_routes and any(member.view is None for member in members):
        raise UserError('a parameter group of the role "matrix" holds what is no matrix: write a view for it')
    return role


def _role_of(member: Member) -> str:
    if member.view is not None:
        return MATRIX
    return AUX if len(member.spec.shape) >= 2 else VECTOR


def _with_unique_names(groups: Iterable[Group], taken: set[str]) -> Iterator[Group]:
    """Names tell groups apart in what is printed, counted and saved: "aux", "aux 2", ... (experts': with the role)."""
    for group in groups:
        if EXPERTS in group:
            yield group
            continue
        name, number = group["name"], 2
        while name in taken:
            name, number = f"{group['name']} {number}", number + 1
        taken.add(name)
        yield {**group, "name": name}


def _check_members(groups: Sequence[Group], members: Sequence[Sequence[Member]]) -> None:
    """Refuse parameters that are no plain tensors or are in two groups."""
    seen: dict[int, str] = {}
    for group, own in zip(groups, members, strict=True):
        for member in own:
            check_plain(member.parameter, member.spec.name)
            if id(member.parameter) in seen:
                raise UserError(
                    f"{member.spec.name} is in the parameter groups {seen[id(member.parameter)]!r} and "
                    f"{group['name']!r}: leave it in one"
                )
            seen[id(member.parameter)] = group["name"]
