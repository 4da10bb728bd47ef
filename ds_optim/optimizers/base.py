"""One step for all rules: bind, check, and carry out what each group's rule says.

ZeRO calls ``step()`` with one flat partition, fp32 or as DeepSpeed's JSON says bf16, in one of the groups (all
groups at once under ``BF16_Optimizer``, the parameters themselves where nothing is sharded). An optimizer of this
package is a name for a rule and its hyperparameters; nothing here is ever overridden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import DTYPES, NARROW
from ds_optim.errors import UserError
from ds_optim.matrix.polar import PolarSpec
from ds_optim.optimizers.alike import Alike, check_alike, meant_by
from ds_optim.optimizers.costs import Costs
from ds_optim.optimizers.diagnostics import Diagnostics
from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.groups import build_groups, hyper_of
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.options import BF16_AND_CAUTIOUS, CommonOptions, MatrixOptions, check_exchange, check_options
from ds_optim.optimizers.planning import plan_exchanges
from ds_optim.optimizers.rules import RULES, Group
from ds_optim.optimizers.states import init_states
from ds_optim.optimizers.steps import carry_out, finite
from ds_optim.optimizers.stored import StoredOptimizer
from ds_optim.optimizers.unstepped import warn_if_idle, watch
from ds_optim.sharding.binding import Binding, NotYet, bind, check_gradients, taken
from ds_optim.sharding.exchange import Exchange

__all__ = ["CommonOptions", "MatrixOptions", "ZeroOptimizer"]


class ZeroOptimizer(StoredOptimizer):
    """The optimizer that every class of this package is.

    Args:
        params: what ``ds_optim.param_groups`` returns (or bare parameters, for rules without aux).
        rule: the name under which the class's rule is registered.
        lr, weight_decay: of that rule.
        hyper: its other hyperparameters, checked.
        options: common options as the user wrote them.
        spread: whether the rule's matrices take turns over its period, in groups of their own.

    Raises:
        UserError: for any mistake in the arguments.
    """

    has_aux: ClassVar[bool] = False
    """Whether parameters that are no matrices take an aux rule."""
    by_name: ClassVar[bool] = False
    """Whether the rule asks for parameters' names."""

    def __init__(
        self,
        params: Any,
        *,
        rule: str,
        lr: float,
        weight_decay: float,
        hyper: Mapping[str, Any],
        options: Mapping[str, Any],
        spread: bool = False,
    ) -> None:
        check_options(type(self), options)
        self._polar = PolarSpec.from_json(options.get("polar", {}))
        self._exchange = check_exchange(options.get("exchange", {}))
        build = partial(
            build_groups,
            rule=rule,
            lr=lr,
            weight_decay=weight_decay,
            hyper=hyper,
            options=options,
            has_aux=self.has_aux,
            by_name=self.by_name,
            spread=spread,
        )
        built = build(params)
        self._exchanges: dict[int, Exchange] = {}
        self._costs: Costs | None = None
        self._planned = False
        self._diagnostics = Diagnostics() if options.get("diagnostics") else None
        self._momentum_dtype = DTYPES[options.get("momentum_dtype", "float32")]
        own = RULES[rule]
        if self._momentum_dtype != torch.float32 and own.elements and not own.narrow:
            raise UserError(
                f"{type(self).__name__} computes with what it keeps here, and momentum_dtype is for optimizers "
                'that keep one mean of gradients: write momentum_dtype "float32" or leave it out'
            )
        self._cautious = bool(options.get("cautious_decay", False))
        if self._cautious and not own.decoupled:
            raise UserError(f"{type(self).__name__} has no decay beside its update: take cautious_decay out")
        self._universal = False
        self._alike = Alike()
        self.skipped_steps = 0
        super().__init__(build, built, lr, weight_decay)
        watch(self)

    @property
    def polar(self) -> PolarSpec:
        """How matrices are orthogonalized, as the user wrote it."""
        return self._polar

    @property
    def exchanges(self) -> Mapping[int, Exchange]:
        """By unit of the layout, the exchange of its matrices; empty before the first step."""
        return self._exchanges

    @property
    def diagnostics(self) -> dict[str, float]:
        """What ``diagnostics: true`` counted in the last step, ``group/name`` -> number; empty without it."""
        return self._diagnostics.latest if self._diagnostics is not None else {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on whatever tensors stand in ``param_groups`` now.

        Raises:
            RuntimeError: at the first step, before any write, if the memory behind the parameters is not
                what the layout says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if self._settle_groups() and self._binding is not None:
                init_states(self._binding, self._all_groups, self.state, self._momentum_dtype, carried=self._universal)
            binding = self._bound()
        except NotYet:
            self._members = taken(self._members, self._all_groups)
            return loss
        if not binding.sharded:
            check_gradients(binding)
            warn_if_idle(self, binding.tensors)
            if not finite(self.param_groups, binding.differing):
                self.skipped_steps += 1  # under ZeRO, DeepSpeed decides this before it calls
                return loss
        if binding.files is not None:
            binding.files.check()
        self.settle_rates()
        if any(binding.unit_of(t) == 0 for group in self.param_groups for t in group["params"][:1]):
            self._alike.count(binding.peers, lambda: self._meant(binding))
        scratch = Scratch()  # for this call only: nothing but state outlives a step
        units = [self._step_unit(binding, group, scratch) for group in self.param_groups if group["params"]]
        if self._diagnostics is not None and len(binding.layout.units) - 1 in units:
            self._diagnostics.log(binding.comm.rank)
        return loss

    def layout_now(self) -> Binding:
        """Where the parameters lie, also before a first step of this run; collective then."""
        return self._binding or bind(self, self._members, self._all_groups)

    def _bound(self) -> Binding:
        """The binding behind the tensors of this call, made at the first one."""
        binding = self._binding
        tensors = [t for group in self.param_groups for t in group["params"]]
        if binding is None or any(binding.unit_of(t) is None for t in tensors):
            binding = self._bind()
        if not self._planned:
            groups = [self._all_groups[unit.group] for unit in binding.layout.units]
            self._exchanges, self._costs = plan_exchanges(binding, groups, self._polar, self._exchange, self._costs)
            self._planned = True
        return binding

    def _bind(self) -> Binding:
        if inspect.unwrap(type(self).step) is not inspect.unwrap(ZeroOptimizer.step):
            raise RuntimeError(
                f"{type(self).__name__} overrides step(): ds_optim's optimizers step whole layouts and must not "
                "be overridden; register a rule instead"
            )
        binding = bind(self, self._members, self._all_groups)
        self._alike.begin(binding.peers, self._meant(binding))
        if binding.tensor is not None:
            check_alike(binding.tensor.gather_objects(self._meant(binding, shards=False)))
        if self._cautious and any(t.dtype in NARROW for tensors in binding.tensors for t in tensors):
            raise UserError(BF16_AND_CAUTIOUS)
        self._binding, self._planned, self._waits_for_engine = binding, False, False
        init_states(binding, self._all_groups, self.state, self._momentum_dtype, carried=self._universal)
        return binding

    def _settle_files(self, binding: Binding, number: int) -> None:
        """Have the state of a unit that has come from files, and nothing in memory but what is its own."""
        assert binding.files is not None
        init_states(binding, self._all_groups, self.state, self._momentum_dtype, carried=self._universal, only=number)
        (tensor,) = binding.tensors[number]
        binding.files.settle(number, tensor, self.state[tensor])

    def _meant(self, binding: Binding, *, shards: bool = True) -> dict[str, str]:
        """All that the ranks must have alike, by names that a user knows; shards: what lies on each of them, too."""
        options = {
            "optimizer": type(self).__name__,
            "momentum_dtype": self._momentum_dtype,
            "diagnostics": self._diagnostics is not None,
            "cautious_decay": self._cautious,
        }
        held = self._members if shards else None
        alike = meant_by(options, self._polar, self._exchange, self._all_groups, held)
        return {**alike, "layout of the parameters": binding.layout.digest()} if shards else alike

    def _step_unit(self, binding: Binding, group: Group, scratch: Scratch) -> int:
        """What one flat partition (or, unsharded, one group of parameters) is due; the unit's number."""
        number = binding.unit_of(group["params"][0])
        assert number is not None
        unit, comm = binding.layout.units[number], binding.comm_of(number)
        tensors, seed = group["params"], group.get("seed", 0)
        if number in binding.in_files:
            self._settle_files(binding, number)
        lines = binding.lines_of(number)
        local = Local(unit, comm, tensors, self.state, scratch, seed, tensor=binding.tensor, lines=lines)
        if len(local.absent) == len(local.tensors):
            if self._diagnostics is not None:
                self._diagnostics.forget(number)
            return number
        if binding.sharded and local.absent:
            raise RuntimeError("ZeRO called step() without a gradient in the flat partition: nothing was changed")
        rule = RULES[group["rule"]]
        hyper = {**hyper_of(group), "diagnostics": self._diagnostics is not None}
        if self._cautious:
            local.cautious_decay, hyper["weight_decay"] = hyper["weight_decay"], 0.0
        update = rule.update(hyper, local.step)
        old = self._diagnostics.before(local) if self._diagnostics else None
        done = carry_out(local, rule, self._exchanges.get(number), update)
        local.count_step()
        if self._diagnostics and old is not None:
            self._diagnostics.after(number, label_of(group), local, old, update, done)
        return number
