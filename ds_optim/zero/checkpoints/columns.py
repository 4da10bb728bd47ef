"""A checkpoint of ranks that hold other parameters than their neighbours: several checkpoints, each a column of it.

Each tensor-parallel rank has shards of its own, and data-parallel ranks that cut them: a column that shares nothing
with the others. Where experts are dealt out to ranks, those that have the same ones are a column, which they and the
others' dense parameters make whole. A run with as many columns takes each as it was, cut anew for its data-parallel
ranks; for another number of columns parameters themselves would have to be cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers.experts import EXPERTS

WRONG = "the layout is not one that ds-optim knows"
_OF_RANKS = re.compile(r"ep_size_([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One of ``count`` columns.

    experts: whether experts are dealt out to them, and not shards. consecutive: whether the ranks that have the same
    experts are neighbours (DeepSpeed's use_data_before_expert_parallelism), and not ``count`` apart.
    """

    number: int = 0
    count: int = 1
    experts: bool = False
    consecutive: bool = False

    @property
    def tensor(self) -> int:
        """The tensor-parallel rank."""
        return 0 if self.experts else self.number

    @property
    def tensor_ranks(self) -> int:
        return 1 if self.experts else self.count

    def ranks(self, among: int) -> list[int]:
        """Which of so many data-parallel ranks have this column's experts."""
        if self.consecutive:
            size = among // self.count
            return list(range(self.number * size, (self.number + 1) * size))
        return list(range(self.number, among, self.count))

    def sharing(self, group: Mapping[str, Any], among: int) -> list[int]:
        """Which of so many data-parallel ranks cut the parameters of an optimizer's group."""
        return self.ranks(among) if is_of_experts(group) else list(range(among))


def is_of_experts(group: Mapping[str, Any]) -> bool:
    """Whether a saved group is one of experts that fewer ranks share."""
    return group.get(EXPERTS) is True


def experts_over(groups: Iterable[Mapping[str, Any]], folder: Path) -> int | None:
    """Among how many ranks an optimizer's experts are dealt out; None where it has none.

    Raises:
        UserError: among how many differs by group.
    """
    names = sorted({str(group.get("name")) for group in groups if is_of_experts(group)})
    if not names:
        return None
    found = _OF_RANKS.fullmatch(names[0])
    if len(names) > 1 or found is None:
        raise UserError(f"{folder} has experts in groups called {', '.join(names)}: those of one ep_size are cut anew")
    return int(found[1])
