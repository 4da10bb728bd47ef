"""A check and its outcome, as a row of results and as a line of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ds_optim.report.cells import grouped
from ds_optim.report.plots import Bars
from ds_optim.report.schema import Row
from ds_optim.report.table import Column, TableSpec
from ds_optim.report.units import significant

KIND = "accept"
_MOST_NAMES, _MOST_BARS = 6, 3
_WITHIN, _OVER = "within its limit", "beyond it"


class AcceptSettings(BaseModel):
    """What is accepted. ``gpus``: of this machine, 0 for its CPU; ``ranks``: of a part that trains.

    ``quick``: a few cells of each part, to see that it runs at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(ge=0)
    ranks: int = Field(ge=1)
    quick: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name, where: what, and under which of several conditions.
        figure, limit: what was found, and the most (``ok`` decides) that it may be; None where there is none.
        unit: of both.
        note: what a reader should know; where it is not ``ok``, why.
    """

    name: str
    ok: bool
    where: str = ""
    figure: float | None = None
    limit: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """The figure and its limit in words."""
        if self.figure is None:
            return ""
        against = "" if self.limit is None else f" (limit {significant(self.limit)})"
        return f"{significant(self.figure)} {self.unit}".rstrip() + against

    def row(self, part: str) -> Row:
        """As a row of results.jsonl."""
        reason = None if self.ok else ", ".join(text for text in (self.where, self.text, self.note) if text)
        return Row(
            kind=KIND,
            optimizer=self.name,
            status="ok" if self.ok else "failed",
            reason=reason if reason != "" else "it does not hold",
            extra={
                "part": part,
                "where": self.where,
                "figure": self.figure,
                "limit": self.limit,
                "unit": self.unit,
                "note": self.note,
                "text": self.text,
            },
        )


def within(name: str, figure: float, limit: float, *, where: str = "", unit: str = "", note: str = "") -> Check:
    """The check that ``figure`` is at most ``limit``; a NaN is not."""
    return Check(name=name, where=where, ok=figure <= limit, figure=figure, limit=limit, unit=unit, note=note)


def page_rows(rows: Iterable[Row]) -> list[Row]:
    """A row for each part and name: of its conditions how many hold, and the one nearest to its limit."""
    return [_joined(of_one) for of_one in grouped(rows, lambda row: (row.extra["part"], row.optimizer)).values()]


def held(rows: Sequence[Row]) -> str:
    """How many hold, of how many."""
    return f"{sum(row.status == 'ok' for row in rows)} of {len(rows)} hold"


def verdict(rows: Sequence[Row]) -> str:
    """How many hold, and which do not."""
    names = [
        f"{row.extra['part']}: {row.optimizer} ({row.extra['held']})" for row in page_rows(rows) if row.status != "ok"
    ]
    if not names:
        return f"{held(rows)}: this machine is accepted."
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{held(rows)}; not: {', '.join(names[:_MOST_NAMES])}{more}."


def nearest(rows: Sequence[Row]) -> Bars | None:
    """Of each part the checks nearest to their limits, as shares of these; None where nothing has a limit."""
    found: dict[str, list[tuple[str, float]]] = {row.extra["part"]: [] for row in rows}
    for row in page_rows(rows):
        if row.extra["limit"] and math.isfinite(_nearness(row)):
            found[row.extra["part"]].append((row.optimizer, _nearness(row)))
    shown = {part: sorted(shares, key=lambda s: -s[1])[:_MOST_BARS] for part, shares in found.items() if shares}
    bars = {part: [(name, {_OVER if s > 1 else _WITHIN: s}) for name, s in shares] for part, shares in shown.items()}
    if not shown:
        return None
    return Bars(
        name="nearest",
        title="The checks nearest to their limits, by part",
        groups=bars,
        text=lambda share: f"{significant(100 * share)} %",
        parts={_WITHIN: "#4aa564", _OVER: "#c0392b"},
        limits={(part, name): 1.0 for part, shares in shown.items() for name, _ in shares},
    )


def _joined(rows: Sequence[Row]) -> Row:
    failed = [row for row in rows if row.status != "ok"]
    shown = failed[0] if failed else max(rows, key=_nearness)
    reason = None
    if failed:
        more = f", and {len(failed) - 1} more of {len(rows)}" if len(failed) > 1 else ""
        reason = f"{failed[0].reason}{more}"
    extra = {**shown.extra, "held": f"{len(rows) - len(failed)} of {len(rows)}"}
    return shown.model_copy(update={"reason": reason, "extra": extra})


def _nearness(row: Row) -> float:
    figure, limit = row.extra["figure"], row.extra["limit"]
    if figure is None or limit is None:
        return -1.0
    return float(figure / limit) if limit else float(figure)


PAGE = TableSpec(
    columns=(
        Column(title="Part", value=lambda row: row.extra["part"]),
        Column(title="Check", value=lambda row: row.optimizer),
        Column(title="Hold", value=lambda row: row.extra["held"]),
        Column(title="Nearest to its limit", value=lambda row: row.extra["text"] or None),
        Column(title="Where", value=lambda row: row.extra["where"] or None),
        Column(title="Note", value=lambda row: row.extra["note"] or None),
    ),
    group=lambda row: row.extra["part"],
)
