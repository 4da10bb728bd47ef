"""DeepSpeed's schedulers, four of which write one rate into all parameter groups (DeepSpeed #7713).

They take a list too, one rate for each group. So a JSON's single value becomes a list before DeepSpeed reads it, and
a scheduler that was made without this package gets its lists when the engine that holds it is first met. The fifth,
``WarmupCosineLR``, scales what it finds in each group and needs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.routes import say
from ds_optim.optimizers.rules import Group
from ds_optim.optimizers.shares import Ratios, described, is_one, shares, take_shares

RATES: dict[str, dict[str, float | None]] = {
    "WarmupLR": {"warmup_max_lr": None, "warmup_min_lr": 0.0},
    "WarmupDecayLR": {"warmup_max_lr": 1e-3, "warmup_min_lr": 0.0},
    "OneCycle": {"cycle_max_lr": None, "cycle_min_lr": None},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3},
    "OneCycleLR": {"max_lr": None},
    "CyclicLR": {"max_lr": None, "base_lr": None},
}
"""By type of a JSON's scheduler its rates, the peak first, with DeepSpeed's default where that is one value."""
_LISTS = {
    "WarmupLR": ("max_lrs", "min_lrs", "delta_lrs"),  # and WarmupDecayLR, which is one
    "OneCycle": ("max_lrs", "min_lrs"),
    "LRRangeTest": ("min_lr",),
    "CyclicLR": ("max_lrs", "base_lrs"),  # torch's
}
"""By class of a scheduler the lists of rates that it holds, the peak first."""


def share_config(config: dict[str, Any], optimizer: ZeroOptimizer) -> list[float] | None:
    """Make lists of the single rates in a config's "scheduler"; the peaks, where it has such rates.

    Raises:
        UserError: a list is not of one rate for each group, or nothing says what a group's part is.
    """
    section = config.get("scheduler")
    kind = section.get("type") if isinstance(section, Mapping) else None
    given = section.get("params", {}) if isinstance(section, Mapping) else None
    if kind not in RATES or not isinstance(given, Mapping):
        return None
    params = {**{key: value for key, value in RATES[kind].items() if value is not None}, **given}
    groups, several = optimizer.param_groups, len(set(optimizer.lr_ratios)) > 1
    for key in RATES[kind]:
        value = params.get(key)
        if isinstance(value, (list, tuple)) and len(value) != len(groups):
            names = ", ".join(str(label_of(group)) for group in groups)
            raise UserError(
                f"scheduler.params.{key} has {len(value)} rates and the optimizer {len(groups)} parameter groups "
                f"({names}): write one rate, which each takes its share of, or one for each"
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool) and several:
            params[key] = [value * part for part in shares(groups, optimizer.lr_ratios, kind)]
    config["scheduler"] = {**section, "params": params}  # type: ignore[dict-item]
    peaks = params.get(next(iter(RATES[kind])))
    return list(peaks) if isinstance(peaks, (list, tuple)) else None


def prepare_scheduler(engine: Any, optimizer: ZeroOptimizer, groups: Sequence[Group]) -> list[float] | None:
    """Give an engine's scheduler a rate for each group where it has one for all; the peaks, where it tells them.

    Raises:
        UserError: nothing says what a group's part is.
    """
    scheduler = getattr(engine, "lr_scheduler", None)
    if optimizer.loaded_shares:
        _own_bases(scheduler, groups)
        optimizer.loaded_shares = False
    names = next((_LISTS[cls.__name__] for cls in type(scheduler).__mro__ if cls.__name__ in _LISTS), ())
    if names and len(set(optimizer.lr_ratios)) > 1 and not _listed(engine):
        _share_lists(scheduler, names, groups, optimizer.lr_ratios)
    optimizer.settle_rates()
    found = getattr(scheduler, names[0] if names else "org_lrs", None)  # which WarmupCosineLR scales
    return list(map(float, found)) if isinstance(found, list) and len(found) == len(groups) else None


def _share_lists(scheduler: Any, names: Sequence[str], groups: Sequence[Group], ratios: Ratios) -> None:
    """Where a scheduler's peak is one for all groups, give each its share of all rates that the scheduler holds."""
    lists = {name: getattr(scheduler, name, None) for name in names}
    if not all(isinstance(rates, list) and len(rates) == len(groups) for rates in lists.values()):
        return
    if len(set(map(float, lists[names[0]] or ()))) > 1:
        return
    kind = type(scheduler).__name__
    parts = shares(groups, ratios, kind)
    for name, rates in lists.items():
        setattr(scheduler, name, [rate * part for rate, part in zip(rates or (), parts, strict=True)])
    if is_one(groups, "lr"):  # what it has written; a checkpoint that was loaded has brought each group's own
        take_shares(groups, parts)
    say(f"ds_optim: {kind}'s one rate is shared out: {described(groups, getattr(scheduler, names[0]))}")


def _listed(engine: Any) -> bool:
    """Whether the engine's own JSON has a rate for each group, so that equal ones are meant."""
    section = engine.config.get("scheduler") if isinstance(getattr(engine, "config", None), Mapping) else None
    params = section.get("params") if isinstance(section, Mapping) else None
    if getattr(engine, "client_lr_scheduler", None) is not None or not isinstance(params, Mapping):
        return False
    return any(isinstance(value, (list, tuple)) for value in params.values())


def _own_bases(scheduler: Any, groups: Sequence[Group]) -> None:
    """The first release kept one rate in all groups, and so have torch's schedulers in its checkpoints."""
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        if hasattr(one, "base_lrs") and all("initial_lr" in group for group in groups):
            one.base_lrs = [group["initial_lr"] for group in groups]
