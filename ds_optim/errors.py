"""The errors a user can mend, and what they say is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user wrote: one line that says what to write instead.

    The command line prints the line and exits with status 2; the API raises it as the ``ValueError`` it is.
    """


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``word``; None where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known name is near."""
    near = closest(word, known)
    return f" (did you mean {near!r}?)" if near else ""


def instead(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'? write one of x, y``, the question only where a known name is near."""
    names = list(known)
    near = closest(word, names)
    return (f"did you mean {near!r}? " if near else "") + f"write one of {', '.join(names)}"
