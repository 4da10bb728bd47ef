"""Checks of what a user wrote: each error is one line that says what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ds_optim.errors import UserError, closest

Check = Callable[[str, Any], Any]
"""(name of a value, the value as somebody wrote it) -> the value as it is used; UserError where it is no good."""

# What other optimizers call the same. A name means the first of these that there is.
PEERS: dict[str, tuple[str, ...]] = {
    "beta": ("momentum", "betas"),
    "betas": ("beta", "momentum"),
    "mu": ("momentum", "beta", "betas"),
    "momentum": ("beta", "betas"),
    "beta1": ("betas", "beta", "momentum"),
    "beta2": ("betas", "beta", "momentum"),
    "dampening": ("momentum", "beta", "betas"),
    "wd": ("weight_decay",),
    "learning_rate": ("lr",),
    "matrix_lr": ("lr",),
    "muon_lr": ("lr",),
    **dict.fromkeys(("adam_lr", "adamw_lr", "lion_lr", "scalar_lr", "embed_lr", "head_lr"), ("aux_lr",)),
    **dict.fromkeys(("adam_betas", "adamw_betas", "lion_betas"), ("aux_betas",)),
    **dict.fromkeys(("adam_wd", "adamw_wd", "adam_weight_decay", "adamw_weight_decay"), ("aux_weight_decay",)),
    **dict.fromkeys(("scalar_optimizer", "aux_optimizer", "backup_optimizer"), ("aux",)),
    **dict.fromkeys(("nesterov_momentum", "use_nesterov"), ("nesterov",)),
    **dict.fromkeys(("adjust_lr", "adjust_lr_fn", "scale_mode", "rms_scale", "match_rms_adamw"), ("scale",)),
    **dict.fromkeys(("ns_steps", "num_ns_steps", "backend_steps", "newton_schulz_steps"), ('polar={"steps": ...}',)),
    **dict.fromkeys(("ns_coefficients", "coefficient_type", "coefficients"), ('polar={"schedule": ...}',)),
    **dict.fromkeys(("backend", "ns_method", "use_polar_express"), ('polar={"method": ...}',)),
}
_WITHOUT = {
    "eps": "there is nothing to set: it is fixed",
    "foreach": "there is nothing to choose: steps are fused where they can be",
    "fused": "there is nothing to choose: steps are fused where they can be",
    "amsgrad": "it keeps no maximum of the second moment",
    "maximize": "negate the loss",
    "exclude": 'write matrix_exclude, of ds_optim.param_groups or in the JSON\'s "params"',
}
"""Peers' parameters that none of ours corresponds to."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is close or means the same, else the list of known names."""
    names = sorted(known)
    meant = [name for name in PEERS.get(word.lower(), ()) if name in names or name.partition("=")[0] in names]
    close = meant[0] if meant else closest(word.lower(), names)
    if not close and word.lower() in _WITHOUT:
        return f": {_WITHOUT[word.lower()]}"
    return f" (did you mean {close!r}?)" if close else f"; known: {', '.join(names)}"


def plain(value: Any) -> Any:
    """A tensor or a number of numpy's that holds one value as Python's own number; any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def check_keys(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = set(known)
    for key in given:
        if key not in names:
            raise UserError(f"{owner} has no parameter {key!r}{nearest(key, names)}")


def check_choice(key: str, value: Any, choices: Iterable[str]) -> str:
    names = list(choices)
    if value not in names:
        raise UserError(f"{key} is {value!r}{nearest(str(value), names)}")
    return str(value)


def check_at_least_zero(key: str, value: Any) -> float:
    number = _number(key, value)
    if number < 0 or not math.isfinite(number):
        raise UserError(f"{key} is {value!r}: write a finite number that is not negative")
    return number


def check_positive(key: str, value: Any) -> float:
    number = _number(key, value)
    if number <= 0 or not math.isfinite(number):
        raise UserError(f"{key} is {value!r}: write a finite number above 0")
    return number


def check_beta(key: str, value: Any) -> float:
    number = _number(key, value)
    if not 0 <= number < 1:
        raise UserError(f"{key} is {value!r}: write a number in [0, 1)")
    return number


def check_fraction(key: str, value: Any) -> float:
    number = _number(key, value)
    if not 0 < number <= 1:
        raise UserError(f"{key} is {value!r}: write a number above 0 and at most 1")
    return number


def check_betas(key: str, value: Any) -> tuple[float, float]:
    pair = value.tolist() if getattr(value, "ndim", None) == 1 else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise UserError(f"{key} is {value!r}: write a pair of numbers in [0, 1), such as [0.9, 0.99]")
    return check_beta(key, pair[0]), check_beta(key, pair[1])


def check_new_weight(key: str, value: Any) -> float:
    """Of a new gradient: what is left of the old momentum is 1 less this."""
    number = _number(key, value)
    if not 0 < number <= 1:
        raise UserError(f"{key} is {value!r}: write a number in (0, 1], the weight of the new gradient")
    return number


def check_seed(key: str, value: Any) -> int:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**32:
        raise UserError(f"{key} is {value!r}: write a whole number from 0 to 4294967295")
    return number


def check_whole(key: str, value: Any) -> int:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise UserError(f"{key} is {value!r}: write a whole number from 0")
    return number


def check_bool(key: str, value: Any) -> bool:
    flag = plain(value)
    if not isinstance(flag, bool):
        raise UserError(f"{key} is {value!r}: write true or false")
    return flag


def check_period(key: str, value: Any) -> float:
    """An int from 1, or infinity (also as the string "inf", which JSON needs)."""
    number = plain(value)
    if number in ("inf", math.inf):
        return math.inf
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 1 or number != int(number):
        raise UserError(f'{key} is {value!r}: write a whole number from 1, or "inf"')
    return int(number)


def one_of(choices: Iterable[str]) -> Check:
    """The check of a value that must be one of ``choices``."""
    names = tuple(choices)
    return lambda key, value: check_choice(key, value, names)


def _number(key: str, value: Any) -> float:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise UserError(f"{key} is {value!r}: write a number")
    return float(number)
