"""A DeepSpeed JSON for another optimizer becomes one for an optimizer of this package.

What cannot stay is changed, each change with its reason; "auto" stays for the trainer that fills it in. What comes
out has been read by DeepSpeed's own reader, and its optimizer built, before anybody sees it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.optimizers.registry import canonical_type
from ds_optim.optimizers.routing import ROUTING_OPTIONS
from ds_optim.zero.auto import AUTO, CALLERS, at, fill_auto
from ds_optim.zero.config import build_optimizer
from ds_optim.zero.conversion.changes import Changes
from ds_optim.zero.conversion.rates import RATIOS, UNKNOWN, Ratio
from ds_optim.zero.conversion.sections import autos, mend, rounded, scale_schedule
from ds_optim.zero.conversion.source import HEADS, Source, read_source
from ds_optim.zero.support import check_config
from ds_optim.zero.values import understood

_AUX = "a sign's rate, AdamW's / 10, of what is no matrix"


@dataclass(frozen=True)
class Converted:
    """The config, a line for each change (where: what (why)), and the paths that are "auto" still."""

    config: dict[str, Any]
    changes: list[str]
    left: list[str]


def convert(
    config: Mapping[str, Any], to: str, *, lr: float | None = None, weight_decay: float | None = None
) -> Converted:
    """The config with the optimizer ``to`` in it, and all that it cannot run with changed.

    Args:
        config: as ``load_config`` reads it. Without "optimizer", rate and decay are the trainer's: "auto".
        to: the type of an optimizer of this package.
        lr, weight_decay: AdamW's, in place of the config's.

    Raises:
        UserError: ``to`` is no optimizer of this package, the config is none that DeepSpeed takes, or nothing says
            what the rate should be.
    """
    name = canonical_type(to)
    if name not in OPTIMIZERS:
        raise UserError(f"--to {to!r} is no optimizer of ds_optim: write one of {', '.join(OPTIMIZERS)}")
    changes = Changes(copy.deepcopy(dict(config)))
    source = read_source(changes.config.get("optimizer"), name, lr=lr, weight_decay=weight_decay)
    _put_optimizer(changes, source, name)
    _check(changes.config, name)
    left = [
        path for path in autos(changes.config) if path != f"optimizer.params.{HEADS}"
    ]  # which param_groups fills in
    return Converted(changes.config, changes.lines, left)


def _put_optimizer(changes: Changes, source: Source, name: str) -> None:
    ratio = source.ratio if source.same else RATIOS.get(name, UNKNOWN)
    new_lr = _rate(source, name, ratio)
    factor = ratio.decay / source.ratio.decay
    decay = AUTO if source.weight_decay == AUTO else rounded(source.weight_decay * factor)
    params = {"lr": new_lr, "weight_decay": decay, **({} if source.same else ratio.params), **source.kept}
    changes.config.pop("optimizer", None)
    changes.config = {"optimizer": {"type": name, "params": params}, **changes.config}
    changes.say("optimizer", f"{source.type or 'none, the trainer has one'} -> {name}", "as chosen")
    if not source.same:
        why = ratio.why if source.ratio.lr in (1.0, None) or ratio.lr is None else f"{ratio.why}; {source.ratio.why}"
        rate = _told("lr", "learning_rate", source.lr, new_lr, ratio.lr)
        changes.say(
            "optimizer.params", f"{rate}; {_told('weight_decay', None, source.weight_decay, decay, factor)}", why
        )
        for key in ratio.params:
            if key not in source.kept:
                changes.say(f"optimizer.params.{key}", repr(params[key]), "what that rate is for")
        if ratio.aux is not None and "aux_lr" not in params:
            params["aux_lr"] = rounded(source.adamw_lr(name) * ratio.aux)
            changes.say("optimizer.params.aux_lr", f"{params['aux_lr']:g}", _AUX)
    for key, why in source.moved.items():
        changes.say(f"optimizer.params.{key}", repr(params[key]), why)
    for key, why in source.dropped.items():
        changes.say(f"optimizer.params.{key}", "taken out", why)
    if source.clip is not None and changes.config.get("gradient_clipping") in (None, AUTO):
        changes.set("gradient_clipping", source.clip, "as the optimizer's max_grad_norm was")
    both = AUTO not in (source.lr, new_lr) and source.lr
    scale_schedule(changes, new_lr / source.lr if both else None)
    mend(changes, from_muon=source.is_muon)


def _rate(source: Source, name: str, ratio: Ratio) -> Any:
    if source.same:
        return source.lr
    if ratio.lr is None:
        return float(inspect.signature(OPTIMIZERS[name]).parameters["lr"].default)
    return AUTO if source.lr == AUTO else rounded(source.adamw_lr(name) * ratio.lr)


def _told(key: str, argument: str | None, old: Any, new: Any, factor: float | None) -> str:
    """What became of a number, or what the trainer's argument of that name has to become."""
    if new != AUTO:
        return f"{key} {new:g}" if old in (AUTO, new) else f"{key} {old:g} -> {new:g}"
    if factor == 1.0:
        return f'{key} "auto", as for AdamW'
    return f'{key} "auto": give the trainer a {argument or key} of {factor:g} times AdamW\'s'


def _check(config: Mapping[str, Any], name: str) -> None:
    """Read the result as its user will, with something in the place of each "auto"."""
    filled = copy.deepcopy(dict(config))
    stands_in = {**dict.fromkeys(CALLERS, False), "gradient_clipping": 1.0, "zero_optimization.stage": 1}
    stands_in |= {"optimizer.params.lr": 1e-3, "optimizer.params.weight_decay": 0.1}
    for path in autos(filled):
        *above, key = path.split(".")
        owner = at(filled, ".".join(above)) if above else filled
        if path in stands_in:
            owner[key] = "cpu" if path.endswith(".device") else stands_in[path]
        elif above and above[0] == "scheduler":
            owner[key] = 1
    for option in ROUTING_OPTIONS:  # patterns are for a model that is not here
        filled["optimizer"]["params"].pop(option, None)
    check_config(filled)
    filled = understood(filled)
    fill_auto(filled, hidden_size=64)
    build_optimizer(nn.Sequential(nn.Linear(4, 4)), name, filled)
