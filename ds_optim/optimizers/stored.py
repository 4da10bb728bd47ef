"""What of an optimizer goes into a checkpoint, and what of one comes back: torch's protocol, with a description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_optim.optimizers.alike import NOTHING, Alike, join_load, steps_of
from ds_optim.optimizers.costs import Costs
from ds_optim.optimizers.experts import sharing
from ds_optim.optimizers.grouped import GroupedOptimizer
from ds_optim.optimizers.loading import unwrap, wrapped
from ds_optim.optimizers.rules import RULES
from ds_optim.optimizers.saved import (
    COSTS,
    SAVED,
    Identity,
    check_saved,
    check_stored_dtype,
    has_shares,
    with_description,
    without_description,
)
from ds_optim.optimizers.universal import restore_groups
from ds_optim.sharding.binding import taken


class StoredOptimizer(GroupedOptimizer):
    """An optimizer whose state is saved and loaded with what it must be of."""

    _alike: Alike
    _costs: Costs | None
    _momentum_dtype: torch.dtype
    _planned: bool
    _universal: bool

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a description in each group; flat tensors lead a placeholder for each buffer that
        DeepSpeed's universal checkpoints ask for and this optimizer has not (see ``ds_optim.optimizers.saved``).
        """
        self._settle_groups()
        if self._binding is not None and self._binding.files is not None:
            self._binding.files.release(self.state)
        parameters = (m.parameter for members in self._members for m in members)
        return with_description(super().state_dict(), self.identity(), self.param_groups, parameters, self._costs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that state keeps the dtype in which it was saved.

        Raises:
            UserError: it was saved in another one than this optimizer's, or by another optimizer, or for other
                parameters; nothing was loaded.
        """
        problem, plain, description = None, state_dict, None
        try:
            plain, description = self._loadable(state_dict)
        except Exception as fault:  # passed on below, once every rank knows
            problem = fault
        loaded = NOTHING if problem is not None else f"step {steps_of(plain)}"
        join_load(self, problem, loaded)
        super().load_state_dict(wrapped(plain))
        unwrap(self)
        self._keep_costs(description)
        self._alike.loaded = loaded
        self.loaded_shares = has_shares(state_dict["param_groups"])
        if self.loaded_shares:  # whoever knows the scheduler is to look at it again
            self._binding = None

    def _loadable(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What is to be loaded, and its description; raises as ``load_state_dict``."""
        plain, description = without_description(state_dict)
        check_saved(plain["param_groups"], description, self.identity())
        for group in plain["param_groups"]:
            for number in group["params"]:
                check_stored_dtype(plain["state"].get(number, {}), RULES[group["rule"]], self._momentum_dtype)
        return plain, description

    def _keep_costs(self, description: Mapping[str, Any] | None) -> None:
        """Make the plan of the saved run again, where a checkpoint brings what it was made from."""
        costs = description.get(COSTS) if description is not None else None
        if costs is not None and costs != self._costs:
            self._costs, self._planned = costs, False

    def identity(self) -> Identity:
        """What a checkpoint must be of to be loaded here."""
        stepped = taken(self._members, self._all_groups)
        specs = tuple(tuple(m.spec for m in members) for members in stepped)
        return Identity(
            optimizer=type(self).__name__,
            momentum_dtype=str(self._momentum_dtype).removeprefix("torch."),
            names=self._names,
            rules=self._rules,
            parameters=specs,
            sharing=tuple(sharing(members[0].parameter) if members else () for members in stepped),
            tensor_parallel=max((len(s.shard.pieces) for own in specs for s in own if s.shard), default=1),
        )

    def _settle_groups(self) -> bool:
        """Put right what a universal load wrote into the groups since the last call; whether there was one."""
        description = next((group[SAVED] for group in self._all_groups if SAVED in group), None)
        if description is None:
            return False
        restore_groups(self._all_groups, self.identity())
        self._keep_costs(description)
        self._universal = True
        return True

    @property
    def has_loaded(self) -> bool:
        """Whether it was given the state of a checkpoint."""
        return self._alike.loaded != NOTHING
