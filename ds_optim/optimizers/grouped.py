"""Torch's protocol of an optimizer: its groups and their rates, copies of it, and who reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.optimizers.alike import Alike
from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.groups import Built
from ds_optim.optimizers.routes import say
from ds_optim.optimizers.shares import settle_rates
from ds_optim.sharding.binding import Binding, Member, is_read_by_engine

_COPIED = (
    *("_members", "_lr_ratios", "_built_rates", "_shares_rates", "_sealed", "loaded_shares"),
    *("_polar", "_exchange", "_momentum_dtype", "_diagnostics", "_costs", "_cautious"),
    *("_build", "_names", "_rules", "_universal", "skipped_steps"),
)
"""What a copy of an optimizer keeps besides what torch copies."""


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer of groups that know their members, and the rate that each was built with.

    Args:
        build: what fills groups in, these and any that are added.
        built: the groups, filled in.
        lr, weight_decay: the optimizer's own, for schedulers that ask its ``defaults``.
    """

    loaded_shares: bool
    """Whether the first release saved what was loaded last, and a scheduler still has to be told of it."""

    def __init__(self, build: Callable[..., Built], built: Built, lr: Any, weight_decay: Any) -> None:
        self._build = build
        # Members hold the model's own parameters and never enter the groups, which are pickled.
        self._members = built.members
        self._lr_ratios = built.ratios
        self._built_rates = [float(group["lr"]) for group in built.groups]
        # As built: a universal load at stage 3 writes the first group's into all.
        self._names = tuple(label_of(group) for group in built.groups)
        self._rules = tuple(group["rule"] for group in built.groups)
        self._shares_rates = len(set(built.ratios)) > 1
        self._binding: Binding | None = None
        self.loaded_shares = False
        self._sealed = False
        # No betas or momentum among the defaults: OneCycle and CyclicLR would cycle them unasked.
        super().__init__(built.groups, {"lr": float(lr), "weight_decay": float(weight_decay)})
        self._sealed = True
        # DeepSpeed hides groups by swapping the list; this one keeps seeing them all.
        self._all_groups = self.param_groups
        self._waits_for_engine = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, as torch's.

        To read them is all that DeepSpeed's constructor does once the engine stands; so it is here that a client
        optimizer first meets the engine, and refuses what it would have to refuse at its first step.
        """
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        if self.__dict__.get("_waits_for_engine", False):
            self._waits_for_engine = False  # the check reads them too
            self._waits_for_engine = not is_read_by_engine(self, self._members, groups)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, one of ``ds_optim.param_groups`` where the rule asks for shapes, before anything is stepped.

        Raises:
            UserError: an engine has the other groups, or they were stepped or loaded: their layout and exchange are
                fixed; or what the constructor refuses of groups.
        """
        if not self._sealed:
            super().add_param_group(param_group)
            return
        if self._binding is not None or self.state or not self._waits_for_engine:
            raise UserError(
                "parameter groups cannot be added once an engine has the optimizer, or it was stepped or loaded: add "
                "them before, or build a new optimizer from ds_optim.param_groups over all that it is to train"
            )
        there = Built(groups=self.param_groups, members=self._members, ratios=self._lr_ratios)
        added = self._build([param_group], beside=there)
        for group in added.groups:  # more than one where it is cut into turns
            super().add_param_group(group)
            self._built_rates.append(float(group["lr"]))
            self._names, self._rules = (*self._names, label_of(group)), (*self._rules, group["rule"])
        self._members += added.members
        self._lr_ratios += added.ratios
        self._shares_rates = len(set(self._lr_ratios)) > 1

    def __getstate__(self) -> dict[str, Any]:
        # What a step makes for itself is made again: it holds process groups, and this rank's memory by address.
        remade: dict[str, Any] = {"_binding": None, "_exchanges": {}, "_planned": False, "_waits_for_engine": True}
        remade["_alike"] = Alike()
        own = {key: value for key, value in self.__dict__.items() if key in _COPIED}
        return {**super().__getstate__(), **own, **remade}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = self.param_groups  # loading a checkpoint makes new ones

    @property
    def members(self) -> list[list[Member]]:
        """For each parameter group the parameters that the optimizer was built with."""
        return self._members

    def hold(self, members: Sequence[Sequence[Member]]) -> None:
        """Take the parameters as they lie on this rank, once an engine has cut them over tensor-parallel ranks."""
        self._members = [list(group) for group in members]

    @property
    def lr_ratios(self) -> list[float | None]:
        """Of each group's rate, as it was built, to the optimizer's "lr"; None where that is 0 and says nothing.

        For schedules that know one rate for all: a group's own is its share of it.
        """
        return self._lr_ratios

    @property
    def built_rates(self) -> list[float]:
        """The rate that each group was built with."""
        return self._built_rates

    def settle_rates(self) -> None:
        """Share out a rate that torch's OneCycleLR has written into all groups, or say once that all have one.

        Raises:
            UserError: nothing says what a group's part is.
        """
        said = settle_rates(self._all_groups, self._lr_ratios) if self._shares_rates else None
        if said is not None:
            self._shares_rates = False
            say(f"ds_optim: {said}")
