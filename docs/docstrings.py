"""Docstrings as mkdocstrings should read them: what they say in Sphinx's way, or in a section of one line."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]*)`")
_ONE_LINE = re.compile(r"^Args: (?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes docstrings as they are loaded."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if getattr(obj, "docstring", None) is not None:
            obj.docstring.value = _ONE_LINE.sub("Arguments are ", _ROLE.sub(r"`\1`", obj.docstring.value))
