"""A checkpoint of one optimizer, for another.

Momentum goes over as it is where both mean the same by it. Here all do: m <- b m + (1 - b) g, a mean of gradients,
in AdamW, Lion, Signum, Muon, LionMuon and their kin alike, none of which stores it with its bias corrected; no factor
lies between them. (Muon and SGD elsewhere keep the sum m <- b m + g: that is "momentum_buffer", and is refused.)
Steps done go over too. The rate goes on at the fraction of its peak that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS, ZeroOptimizer
from ds_optim.optimizers.kinds import NO_VIEW, STACK
from ds_optim.optimizers.rules import MEAN, MOMENTUM, ROOT_SQUARES, RULES, STEP, Rule
from ds_optim.optimizers.saved import PARAMETERS, describe
from ds_optim.sharding.binding import Member
from ds_optim.zero.checkpoints.module import Module
from ds_optim.zero.checkpoints.portable import Portable, SavedGroup
from ds_optim.zero.config import build_optimizer, canonical_type

_ADAM_NAMES = ("adam", "adamw")


def reset_optimizer(portable: Portable) -> Portable:
    """Without the optimizer's state: weights, schedule and the place in the data stay."""
    names = [spec.name for spec in portable.specs]
    nothing: dict[str, dict[str, Any]] = {name: {} for name in names}
    return replace(portable, has_state=False, scalars={}, rows={}, entries=nothing, buffers=dict.fromkeys(names, ()))


def change_optimizer(portable: Portable, name: str, params: Mapping[str, Any], *, reset: bool = False) -> Portable:
    """The checkpoint as ``name`` with these JSON parameters would have written it.

    Args:
        reset: start its state anew.

    Raises:
        UserError: a state that it does not get from the old one, parameters that cannot be routed by name and shape.
    """
    name = canonical_type(name)
    if name.lower() in _ADAM_NAMES:
        return _to_adamw(portable, params, reset)
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name!r}: write one of {', '.join([*OPTIMIZERS, 'AdamW'])}")
    # Heads are read off modules, which a checkpoint has not; they change no role.
    given = {key: value for key, value in params.items() if key != "heads"}
    optimizer = build_optimizer(
        _skeleton(portable),
        name,
        {"optimizer": {"type": name, "params": given}, "zero_optimization": {"stage": 1}},
    )
    _check_routable(m for group in optimizer.members for m in group)
    fraction = _fraction_of_peak(portable)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "initial_lr" in portable.groups[0].hyper:
            group["initial_lr"] = group["lr"]
        group["lr"] *= fraction
    made = replace(_with_groups(portable, optimizer), models=_with_schedule(portable, rates, fraction))
    return reset_optimizer(made) if reset else _with_state(made, portable, optimizer)


def _with_groups(portable: Portable, optimizer: ZeroOptimizer) -> Portable:
    description = describe(optimizer.identity(), optimizer.param_groups)
    hyper = [{key: value for key, value in g.items() if key != PARAMETERS} for g in description["groups"]]
    specs = optimizer.identity().parameters
    groups = tuple(SavedGroup(hyper=h, params=s) for h, s in zip(hyper, specs, strict=True))
    return replace(portable, groups=groups, description=description)


def _with_state(made: Portable, portable: Portable, optimizer: ZeroOptimizer) -> Portable:
    old = {spec.name: group for group in portable.groups for spec in group.params}
    new = {spec.name: group for group in made.groups for spec in group.params}
    if not portable.has_state:
        return reset_optimizer(made)
    kept = DTYPES[optimizer.identity().momentum_dtype]
    stored: dict[str, torch.dtype] = {}
    buffers, entries, scalars = {}, {}, {}
    rows: dict[str, dict[str, Tensor]] = {}
    steps = [int(entry[STEP]) for entry in portable.entries.values() if STEP in entry]
    step = max(steps, default=portable.step - int(portable.models[0].get("skipped_steps", 0)))
    for name, group in new.items():
        rule = RULES[str(group.rule)]
        check_goes_over(portable, name, old[name], rule)
        buffers[name], entries[name] = rule.elements, {STEP: step}
        if rule.scalar:
            scalars[name] = portable.scalars[name]
        for key in rule.rows:
            rows.setdefault(key, {})[name] = portable.rows[key][name]
        if MOMENTUM in rule.elements:
            stored[name] = kept if rule.narrow else torch.float32
    return replace(made, buffers=buffers, entries=entries, scalars=scalars, rows=rows, stored_as=stored)


def check_goes_over(portable: Portable, name: str, old: SavedGroup, rule: Rule) -> None:
    """Refuse a rule whose state is not in the old one's.

    Raises:
        UserError: with the reason, and --reset-optimizer.
    """
    if old.rule == rule.name:
        return
    held = portable.buffers[name]
    meant = _meanings(old, held)
    for buffer in rule.buffers:
        if meant.get(buffer.key) == buffer.means:
            continue
        there = ", ".join(f"{key}, {meant[key]}" if key in meant else key for key in held) or "no buffer"
        raise UserError(
            f"the rule {rule.name!r} keeps {buffer.means} ({buffer.key}) for {name}, and the checkpoint holds {there}: "
            "write --reset-optimizer to start the new optimizer's state anew"
        )


def _meanings(old: SavedGroup, held: tuple[str, ...]) -> dict[str, str]:
    """What a saved group's buffers hold, by key; of one that is not ours, as Adam's kin have it."""
    if old.rule is not None:
        return {buffer.key: buffer.means for buffer in RULES[old.rule].buffers}
    adams = [MEAN, *([ROOT_SQUARES] if "eps" in old.hyper else [])]
    return {buffer.key: buffer.means for buffer in adams if buffer.key in held}


# ------------------------------------------------------------------------------------ the model, without it


def _skeleton(portable: Portable) -> nn.Module:
    """Modules that hold empty parameters of the checkpoint's names and shapes, in its order, tied ones twice.

    What kind of layer a parameter is of cannot be known here: embeddings and heads are found by their names
    alone.
    """
    module = Module(portable)
    shapes = {spec.name: spec.shape for spec in portable.specs}
    parameters = {
        name: nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")) for name, shape in shapes.items()
    }
    for name, shape in module.frozen_shapes.items():
        if name not in shapes:
            parameters[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)
    root = nn.Module()
    for name in module.names:
        held = parameters.get(module.shared.get(name, name))
        if held is not None:
            *path, last = name.split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(last, held)
    return root


def _check_routable(members: Iterable[Member]) -> None:
    """Refuse parameters of three dimensions and more that only a view says more of: a convolution is a matrix, a stack
    is not.

    Raises:
        UserError: naming the first of them.
    """
    for member in members:
        name, shape = member.spec.name, member.spec.shape
        if member.reason in (STACK, NO_VIEW):
            raise UserError(
                f"{name} has the shape {shape}, and without the model nobody knows whether it is a convolution or a "
                'stack of matrices: add {"match": "..."} to "views" in --optimizer-params (with batch_dims for a '
                'stack), or its pattern to "matrix_exclude"'
            )


# --------------------------------------------------------------------------------------------------- AdamW


def _to_adamw(portable: Portable, params: Mapping[str, Any], reset: bool) -> Portable:
    """One group over the model's parameters in its order, with what torch's and DeepSpeed's AdamW look for in it."""
    if not reset:
        raise UserError(
            "AdamW keeps a second buffer that the checkpoint does not hold: write --reset-optimizer to start it anew"
        )
    lr = float(params.get("lr", 1e-3))
    # As torch's AdamW and DeepSpeed's FusedAdam have it.
    hyper = {**torch.optim.AdamW([torch.empty(1, dtype=torch.float32, device="cpu")]).defaults, "bias_correction": True}
    hyper["lr"] = lr * _fraction_of_peak(portable)
    unknown = sorted(set(params) - set(hyper) - {"torch_adam", "adam_w_mode"})
    if unknown:
        raise UserError(f"--optimizer-params: AdamW has no {unknown[0]!r}")
    hyper |= {key: tuple(v) if key == "betas" else v for key, v in params.items() if key in hyper and key != "lr"}
    if "initial_lr" in portable.groups[0].hyper:
        hyper["initial_lr"] = lr
    order = {name: place for place, name in enumerate(Module(portable).names)}
    specs = tuple(sorted(portable.specs, key=lambda spec: order[spec.name]))
    made = replace(portable, groups=(SavedGroup(hyper=hyper, params=specs),), description=None)
    return reset_optimizer(replace(made, models=_with_schedule(portable, [lr], _fraction_of_peak(portable))))


# ------------------------------------------------------------------------------------------------ schedule


def _fraction_of_peak(portable: Portable) -> float:
    """The rate now over the rate that its schedule scales; 1 where nothing tells of a schedule."""
    hyper = portable.groups[0].hyper
    peak = hyper.get("initial_lr")
    section = portable.config.get("scheduler")
    if peak is None and isinstance(section, Mapping):
        given = section.get("params", {})
        peak = given.get("warmup_max_lr", given.get("cycle_max_lr"))
        peak = peak[0] if isinstance(peak, (list, tuple)) and peak else peak
    return float(hyper["lr"]) / float(peak) if isinstance(peak, (int, float)) and peak else 1.0


def _with_schedule(portable: Portable, rates: list[float], fraction: float) -> list[dict[str, Any]]:
    """The model files' contents with a torch scheduler's rates set to the new groups', and its place kept."""
    changed = []
    for model in portable.models:
        config = {key: value for key, value in portable.config.items() if key != "optimizer"}
        state = model.get("lr_scheduler")
        if isinstance(state, Mapping) and "base_lrs" in state:
            state = {**state, "base_lrs": list(rates), "_last_lr": [rate * fraction for rate in rates]}
        changed.append({**model, "ds_config": config, "lr_scheduler": state})
    return changed
