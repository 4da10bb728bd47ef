"""The table of optimizers that README and docs show, made from what each says of itself."""

from __future__ import annotations

from collections.abc import Iterable

from ds_optim.optimizers.registry import DESCRIBED, Described
from ds_optim.optimizers.rules import RULES, Rule

COLUMNS = ("name", "a step", "keeps", "moves", "choose it", "source")
"""Keeps: state, in values for each parameter; moves: what a step sends between ranks beyond what ZeRO sends anyway."""


def table(columns: Iterable[str] = COLUMNS) -> str:
    """All registered optimizers as Markdown: sign rules, rules of matrices, those that keep two values."""
    chosen = tuple(columns)
    rows = [[_cells(described)[column] for column in chosen] for described in in_order()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(chosen), ["---"] * len(chosen), *rows]) + "\n"


def in_order() -> list[Described]:
    """The registered optimizers by kind, in each as they were registered."""
    return sorted(DESCRIBED.values(), key=lambda d: (len(d.rule.elements) > 1, d.cls.has_aux))


def keeps(described: Described) -> str:
    """What its rules keep, such as ``1; `bound: "element"` 2``; options that change nothing are left out."""
    default = _kept(described.rule)
    others = {option: _kept(RULES[rule]) for option, rule in described.rules.items() if option}
    return "; ".join([default, *(f"`{option}` {kept}" for option, kept in others.items() if kept != default)])


def _kept(rule: Rule) -> str:
    parts = [str(len(rule.elements))]
    parts += ["one for each row of a matrix"] * len(rule.rows)
    parts += ["one for each tensor"] * rule.scalar
    return ", ".join(parts)


def _cells(described: Described) -> dict[str, str]:
    return {
        "name": f"`{described.cls.__name__}`",
        "a step": described.step + ("; `aux`" if described.cls.has_aux else ""),
        "keeps": keeps(described),
        "moves": described.moves,
        "choose it": described.when,
        "source": described.paper or "a report without a number",
        "the source's claim": described.claim or "none",
    }
