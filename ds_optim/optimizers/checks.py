"""Checks of what a user wrote: each error is one line that says what to write instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ds_optim.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is close, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(names)}"


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


def check_betas(key: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f"{key} is {value!r}: write a pair of numbers in [0, 1), such as [0.9, 0.99]")
    return check_beta(key, value[0]), check_beta(key, value[1])


def check_new_weight(key: str, value: Any) -> float:
    """Of a new gradient: what is left of the old momentum is 1 less this."""
    number = _number(key, value)
    if not 0 < number <= 1:
        raise UserError(f"{key} is {value!r}: write a number in (0, 1], the weight of the new gradient")
    return number


def check_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise UserError(f"seed is {value!r}: write a whole number from 0 to 4294967295")
    return value


def check_bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}: write true or false")
    return value


def check_period(value: Any) -> float:
    """An int from 1, or infinity (also as the string "inf", which JSON needs)."""
    if value in ("inf", math.inf):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
        raise UserError(f'period is {value!r}: write a whole number from 1, or "inf"')
    return int(value)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{key} is {value!r}: write a number")
    return float(value)
