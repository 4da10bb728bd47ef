"""Regular expressions of an option, and which of them have found something."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ds_optim.errors import UserError


class Patterns:
    """The expressions of one option, searched in names.

    Raises:
        UserError: a lone string in place of a list, or what is no regular expression.
    """

    def __init__(self, option: str, patterns: Sequence[str]) -> None:
        if isinstance(patterns, (str, Mapping)) or not isinstance(patterns, Sequence):
            raise UserError(f"{option} is {patterns!r}: write a list of patterns")
        self.option = option
        self.patterns = []
        for text in patterns:
            try:
                self.patterns.append(re.compile(text))
            except (re.error, TypeError) as problem:
                raise UserError(f"{option}: {text!r} is no regular expression ({problem})") from None
        self.matched = [False] * len(self.patterns)

    def first(self, names: Sequence[str]) -> int | None:
        """The number of the first pattern that is found in one of ``names``."""
        found = None
        for number, pattern in enumerate(self.patterns):
            if any(pattern.search(name) for name in names):
                self.matched[number] = True
                found = number if found is None else found
        return found

    def unmatched(self) -> list[str]:
        """The patterns that have found nothing."""
        return [pattern.pattern for pattern, matched in zip(self.patterns, self.matched, strict=True) if not matched]

    def check_all_matched(self) -> None:
        """Refuse patterns that have found nothing."""
        for pattern in self.unmatched():
            raise UserError(
                f"{self.option}: the pattern {pattern!r} matches no parameter of the model: correct it or leave it out"
            )
