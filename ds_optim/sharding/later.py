"""Registrations by the rooms above, made when somebody first asks for what is registered.

So ``import ds_optim`` need not import them, nor torch, and an optimizer finds its partitions whatever was imported
before.
"""

from __future__ import annotations

from collections.abc import Callable

_waiting: list[Callable[[], object]] = []


def register_later(register: Callable[[], object]) -> None:
    """Call ``register`` before any lookup; once is enough, and a second time does no harm."""
    _waiting.append(register)


def complete() -> None:
    """Make the registrations that wait. One that fails raises here, at every lookup, and is not forgotten."""
    for register in _waiting:
        register()
    _waiting.clear()
