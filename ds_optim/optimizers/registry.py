"""The optimizers that there are, each with what others must know of it: commands, JSON, presets, tables, tests.

What a step keeps and does is said where its rule is registered (``optimizers.rules``); here stands what a user calls
it, where it comes from, and what it is for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ds_optim.errors import UserError
from ds_optim.optimizers.base import ZeroOptimizer
from ds_optim.optimizers.rules import RULES, Rule

PLUGINS = "DS_OPTIM_PLUGINS"
"""Of the environment: files and modules with optimizers of a user's own, apart by os.pathsep; ranks inherit it."""


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


def plugins() -> list[str]:
    """Files and modules of a user's own that this process and its ranks import."""
    return [name for name in os.environ.get(PLUGINS, "").split(os.pathsep) if name]


def load_plugins(given: Sequence[str] = ()) -> None:
    """Import what the environment names, and then ``given``, which ranks started from here will import too.

    Raises:
        UserError: a file that is not there, or that fails.
    """
    named = dict.fromkeys([*plugins(), *(str(Path(n).resolve()) if n.endswith(".py") else n for n in given)])
    for name in named:
        _load(name)
    if named:
        os.environ[PLUGINS] = os.pathsep.join(named)


def _load(name: str) -> None:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        module = f"ds_optim_plugin_{path.stem}"
        loaded = sys.modules.get(module)
        if loaded is not None and loaded.__file__ == str(path):
            return
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    except Exception as problem:
        fault = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        raise UserError(
            f"the plugin {name} cannot be imported ({fault}): name a Python file or a module that calls "
            f"ds_optim.register, by --plugin or in {PLUGINS}"
        ) from problem
