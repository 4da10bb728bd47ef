"""What a model's parameters got, one row a kind: for what is printed at start and for ``ds-optim routes``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_optim.optimizers.derived import unread
from ds_optim.optimizers.kinds import EMBEDDING, HEAD, ROUTER, STACK
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.sharding.binding import Member

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_BY_DEFAULT = (EMBEDDING, HEAD, ROUTER)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Parameters of one kind: of one name but for the numbers of layers, seen alike.

    names: with * for those numbers, where there are several. numel: of all of them. seen: as which matrices, or the
    shape. why: what the view was derived from, or why this is no matrix. matched: their names in full.
    """

    role: str
    names: str
    count: int
    numel: int
    shape: tuple[int, ...]
    seen: str
    why: str
    matched: tuple[str, ...]

    def describe(self) -> str:
        """In a line, without the role."""
        count = f" ({self.count})" if self.count > 1 else ""
        return f"{self.names}{count}: {self.seen}" + (f", {self.why}" if self.why else "")


def rows_of(role: str, members: Iterable[Member]) -> list[Route]:
    """The kinds among a group's members, in their order."""
    kinds: dict[tuple[str, tuple[int, ...], str, str], list[Member]] = {}
    for member in members:
        seen = member.view.describe() if member.view is not None else "x".join(map(str, member.spec.shape))
        key = folded(member.spec.name), member.spec.shape, seen, member.reason or member.derived
        kinds.setdefault(key, []).append(member)
    return [
        Route(
            role=role,
            names=names if len(found) > 1 else found[0].spec.name,
            count=len(found),
            numel=sum(member.spec.numel for member in found),
            shape=shape,
            seen=seen,
            why=why,
            matched=tuple(member.spec.name for member in found),
        )
        for (names, shape, seen, why), found in kinds.items()
    ]


def rows_of_groups(groups: Iterable[Mapping[str, Any]]) -> list[Route]:
    """The kinds in what ``ds_optim.param_groups`` gives."""
    return [row for group in groups for row in rows_of(group["role"], group[MEMBERS])]


def change_of(route: Route, names: Sequence[str]) -> str:
    """What to write into the optimizer's "params" for another route; "" for what nothing changes.

    names: of all parameters, none of which but the route's own the patterns may find.
    """
    pattern = pattern_of(route, names)
    if is_unread(route):
        return _views({"match": pattern, **_split_of(route)})
    if route.role == "matrix":
        aux = f'"matrix_exclude": {json.dumps([pattern])}'
        if not route.why:
            return aux
        return f"{aux}, or for one matrix {_views({'match': pattern})}" if len(route.shape) == 2 else aux
    if route.why in _BY_DEFAULT:
        return '"matrix_exclude_defaults": false, for all embeddings, heads and routers'
    return _views({"match": pattern, "batch_dims": 1}) if route.why == STACK else ""


def is_unread(route: Route) -> bool:
    """Whether the module of a matrix could not be read."""
    return route.role == "matrix" and unread(route.why)


def pattern_of(route: Route, names: Sequence[str]) -> str:
    """A regular expression that finds the route's parameters and no others: the end of their names, if that will do."""
    whole = folded(route.matched[0]) if route.count > 1 else route.matched[0]
    tails = [".".join(whole.split(".")[-count:]) for count in range(2, whole.count(".") + 1)]
    for tail in tails:
        pattern = _escaped(tail) + "$"
        if {name for name in names if re.search(pattern, name)} == set(route.matched):
            return pattern
    return f"^{_escaped(whole)}$"


def folded(name: str) -> str:
    """A parameter's name with * for the numbers of layers."""
    return _NUMBER.sub("*", name)


def _escaped(name: str) -> str:
    return r"\d+".join(map(re.escape, name.split("*")))


def _split_of(route: Route) -> dict[str, Any]:
    """The split to write for what is fused: in halves for gates, else in thirds, where that comes out even."""
    rows = route.shape[-2]
    parts = 2 if re.search("gate|w1", route.names) else 3
    return {} if rows % parts else {"split": [rows // parts] * parts}


def _views(view: Mapping[str, Any]) -> str:
    return f'"views": {json.dumps([view])}'
