"""Factors on the step size by patterns in parameters' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers.checks import check_positive
from ds_optim.sharding.binding import Member

Scales = tuple[tuple[str, float], ...]
"""Plain data, as all that groups hold: checkpoints are read by a loader that builds no class of ours."""


class LayerScales(tuple[tuple[str, float], ...]):
    """What the first release kept in groups; its checkpoints ask for the name, and nothing else does."""


def check_layer_scales(key: str, given: Mapping[str, float] | Sequence[Sequence[Any]]) -> Scales:
    """Pairs of a pattern and a factor, from {pattern: factor} or a list of pairs.

    Raises:
        UserError: they are neither, a pattern is no regular expression, or a factor no number above 0.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not all(map(_is_pair, pairs)):
        raise UserError(f'{key} is {given!r}: write patterns with their factors, such as {{"attn": 1.5}}')
    for pattern, factor in pairs:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as problem:
            raise UserError(f"{key}: {pattern!r} is no regular expression ({problem})") from None
        check_positive(f"{key}[{pattern!r}]", factor)
    return tuple((pattern, float(factor)) for pattern, factor in pairs)


def check_all_match(scales: Scales, members: Iterable[Member]) -> None:
    """Refuse a pattern that somebody wrote and that fits no parameter; a rule's defaults need not fit any."""
    names = [member.spec.name for member in members]
    for pattern, _ in scales:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"layer_scales: the pattern {pattern!r} matches no parameter of the model: correct it or leave it out"
            )


def layer_scale(scales: Sequence[tuple[str, float]], name: str) -> float:
    """The factor of the first pattern that is found in a parameter's name; 1 where none is."""
    return next((factor for pattern, factor in scales if re.search(pattern, name)), 1.0)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
