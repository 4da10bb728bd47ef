"""The optimizers that there are, each with what others must know of it: commands, JSON, presets, tables, tests.

What a step keeps and does is said where its rule is registered (``optimizers.rules``); here stands what a user calls
it, where it comes from, and what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.rules import RULES, Rule


@dataclass(frozen=True, kw_only=True)
class Described:
    """One optimizer, as a table shows it.

    cls: its class, whose name is its JSON type and whose arguments have its defaults. rules: those that its own groups
    may follow, by the option that chooses each; "" is the default. step: what a step is, in a line. moves: what one
    sends between ranks. when: to choose it. paper: with its arXiv number, where it has one. claim: the paper's.
    tuned: by preset of ``ds-optim train`` the arguments that were found to do well.
    """

    cls: type[ZeroOptimizer]
    rules: Mapping[str, str]
    step: str
    moves: str
    when: str
    paper: str = ""
    claim: str = ""
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """The one that it follows by default."""
        return RULES[next(iter(self.rules.values()))]

    @property
    def narrow(self) -> bool:
        """Whether its momentum may be stored in fewer bits, by whatever rule it follows."""
        return any(RULES[name].narrow for name in self.rules.values())


DESCRIBED: dict[str, Described] = {}
"""By the JSON type."""
OPTIMIZERS: dict[str, type[ZeroOptimizer]] = {}
"""The JSON types that mean this package, or a user's own file."""

_Optimizer = TypeVar("_Optimizer", bound=type[ZeroOptimizer])


def register(
    *,
    rules: str | Mapping[str, str],
    step: str,
    moves: str,
    when: str,
    paper: str = "",
    claim: str = "",
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[_Optimizer], _Optimizer]:
    """Make an optimizer class known by its name: in a JSON's "optimizer", to every command, and in the tables.

    Args:
        rules: the name of its rule, or {option that chooses it: its name}, "" for the default.
        step, moves, when, paper, claim, tuned: see :class:`Described`.

    Raises:
        ValueError: the name is another optimizer's, or a rule is not registered.
    """
    named = {"": rules} if isinstance(rules, str) else dict(rules)

    def add(cls: _Optimizer) -> _Optimizer:
        name = cls.__name__
        taken = OPTIMIZERS.get(canonical_type(name))
        if taken is not None and (taken.__module__, taken.__name__) != (cls.__module__, name):
            raise ValueError(f"the optimizer {name} is {taken.__module__}'s: choose another name")
        for rule in named.values():
            if rule not in RULES:
                raise ValueError(f"{name} follows the rule {rule!r}, which is not registered: decorate it before")
        OPTIMIZERS[name] = cls
        DESCRIBED[name] = Described(
            cls=cls, rules=named, step=step, moves=moves, when=when, paper=paper, claim=claim, tuned=tuned or {}
        )
        return cls

    return add


def plain_name(optimizer: str) -> str:
    """The name with case, dashes and underscores taken out: ``lion_muon`` and ``LionMuon`` are one."""
    return optimizer.lower().replace("_", "").replace("-", "")


def canonical_type(name: str) -> str:
    """The name of a registered class for ``name`` ("LionMuon", "lion_muon", "lionmuon"); others as they are."""
    return {plain_name(key): key for key in OPTIMIZERS}.get(plain_name(name), name)
