"""Factors on the step size by patterns in parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers.checks import check_positive


class LayerScales(tuple[tuple[str, float], ...]):
    """Patterns that a user wrote: each must fit some parameter, which is not asked of a rule's defaults."""


def check_layer_scales(given: Mapping[str, float] | Sequence[Sequence[Any]]) -> LayerScales:
    """Pairs of a pattern and a factor, from {pattern: factor} or a list of pairs.

    Raises:
        UserError: they are neither, a pattern is no regular expression, or a factor no number above 0.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not all(map(_is_pair, pairs)):
        raise UserError(f'layer_scales is {given!r}: write patterns with their factors, such as {{"attn": 1.5}}')
    for pattern, factor in pairs:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as problem:
            raise UserError(f"layer_scales: {pattern!r} is no regular expression ({problem})") from None
        check_positive(f"layer_scales[{pattern!r}]", factor)
    return LayerScales((pattern, float(factor)) for pattern, factor in pairs)


def check_all_match(scales: Sequence[tuple[str, float]], names: Sequence[str]) -> None:
    """Refuse a user's pattern that fits no parameter."""
    for pattern, _ in scales if isinstance(scales, LayerScales) else ():
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"layer_scales: the pattern {pattern!r} matches no parameter of the model: correct it or leave it out"
            )


def layer_scale(scales: Sequence[tuple[str, float]], name: str) -> float:
    """The factor of the first pattern that is found in a parameter's name; 1 where none is."""
    return next((factor for pattern, factor in scales if re.search(pattern, name)), 1.0)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
