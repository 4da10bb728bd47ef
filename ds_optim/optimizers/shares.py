"""Schedules that know one learning rate, for groups that have several.

What a schedule writes into a group is what the group steps with. One that is given a single value writes it into all
of them, and would step the aux groups of LionMuon at ten times their rate: each group takes its share of that value
instead, the one that it was built with. Who means one rate for all says so to the optimizer (``aux_lr``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_optim.errors import UserError
from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.rules import Group

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Rates in a group: its own, and what torch's schedulers keep beside it."""
SWA = "swa_lr"
"""What torch's SWALR keeps in a group."""

Ratios = Sequence[float | None]
"""Of each group's rate to the optimizer's "lr"; None where that was 0 and says nothing."""


def shares(groups: Sequence[Group], ratios: Ratios, schedule: str) -> list[float]:
    """Each group's part of one rate.

    Raises:
        UserError: nothing says what some group's is.
    """
    for group, ratio in zip(groups, ratios, strict=True):
        if ratio is None:
            raise UserError(
                f"{schedule} has one rate for all parameter groups, and the optimizer's lr of 0 does not tell the part "
                f"of {group['name']!r}: write the peak lr into the optimizer, or a list into the schedule"
            )
    return [float(ratio) for ratio in ratios if ratio is not None]


def take_shares(groups: Sequence[Group], parts: Sequence[float]) -> None:
    """Scale the rates that stand in the groups."""
    for group, part in zip(groups, parts, strict=True):
        group.update({key: float(group[key]) * part for key in RATES if key in group})


def settle_rates(groups: Sequence[Group], ratios: Ratios) -> str | None:
    """Give each group its share of a rate that torch's OneCycleLR or SWALR has written into all of them; what is to be
    said of this, or of one rate in all groups that nothing tells the origin of, which is left as it is."""
    if is_one(groups, SWA):  # where that schedule leads, which it reads there at each step
        for group, part in zip(groups, shares(groups, ratios, "SWALR"), strict=True):
            group[SWA] = float(group[SWA]) * part
        return f"SWALR's one rate is shared out: {described(groups, [g[SWA] for g in groups])}"
    if not is_one(groups, "lr"):
        return None
    names = ", ".join(str(label_of(group)) for group in groups)
    if is_one(groups, "max_lr"):  # which that schedule alone leaves in a group, and reads there at each step
        take_shares(groups, shares(groups, ratios, "OneCycleLR"))
        return f"OneCycleLR's one rate is shared out: {described(groups, [g['max_lr'] for g in groups])}"
    rate = float(groups[0]["lr"])
    if not rate:
        return None
    return (
        f"all parameter groups ({names}) step at lr {rate:g} and were built with several rates: give a scheduler that "
        "writes one value into all a list of them; if one is meant, build the optimizer with it (aux_lr)"
    )


def is_one(groups: Sequence[Group], key: str) -> bool:
    """Whether ``key`` stands in all groups, with one value."""
    first = groups[0].get(key)
    return first is not None and all(group.get(key) == first for group in groups)


def described(groups: Sequence[Group], rates: Sequence[float]) -> str:
    """``matrix 0.001, aux 0.0001``."""
    return ", ".join(f"{label_of(group)} {rate:g}" for group, rate in zip(groups, rates, strict=True))
