"""One step for all rules: bind, check, and carry out what each group's rule says.

ZeRO calls ``step()`` with one flat fp32 partition in one of the groups (all groups at once under
``BF16_Optimizer``, the parameters themselves where nothing is sharded). An optimizer of this package is a
name for a rule and its hyperparameters; nothing here is ever overridden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_optim.elementwise.blend import blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.steps import adamw_step, apply_update, sign_step
from ds_optim.errors import UserError
from ds_optim.matrix.polar import PolarSpec
from ds_optim.optimizers.matrices import MatrixWorker
from ds_optim.optimizers.options import (
    CommonOptions,
    MatrixOptions,
    build_groups,
    check_exchange,
    check_options,
)
from ds_optim.optimizers.routing import MEMBERS
from ds_optim.optimizers.rules import (
    MOMENTUM,
    RULES,
    SECOND_MOMENT,
    STEP,
    AdamWUpdate,
    Group,
    MatrixUpdate,
    SignUpdate,
)
from ds_optim.sharding.binding import Binding, Member, NotYet, bind
from ds_optim.sharding.layout import Slice

__all__ = ["CommonOptions", "MatrixOptions", "ZeroOptimizer"]


class ZeroOptimizer(torch.optim.Optimizer):
    """The optimizer that every class of this package is.

    Args:
        params: what ``ds_optim.param_groups`` returns (or bare parameters, for rules without aux).
        rule: the name under which the class's rule is registered.
        lr, weight_decay: of that rule.
        hyper: its other hyperparameters, checked.
        options: common options as the user wrote them.

    Raises:
        UserError: for any mistake in the arguments.
    """

    has_aux: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        *,
        rule: str,
        lr: float,
        weight_decay: float,
        hyper: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        check_options(type(self), options)
        self._polar = PolarSpec.from_json(dict(options.get("polar", {})))
        self._exchange = check_exchange(options.get("exchange", {}))
        groups = build_groups(
            params, rule=rule, lr=lr, weight_decay=weight_decay, hyper=hyper, options=options, has_aux=self.has_aux
        )
        # Members hold the model's own parameters and never enter the groups, which are pickled.
        self._members: list[list[Member]] = [group.pop(MEMBERS) for group in groups]
        self._binding: Binding | None = None
        self._workers: dict[int, MatrixWorker] = {}
        self.skipped_steps = 0
        self._sealed = False
        super().__init__(groups, {})
        self._sealed = True
        # DeepSpeed hides groups by swapping the list; this one keeps seeing them all.
        self._all_groups = self.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed once the optimizer is built: their layout and exchange are.

        Raises:
            UserError: for every call by a user.
        """
        if getattr(self, "_sealed", False):
            raise UserError("parameter groups cannot be added later: build a new optimizer from ds_optim.param_groups")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = self.param_groups  # loading a checkpoint makes new ones

    @property
    def members(self) -> list[list[Member]]:
        """For each parameter group the parameters that the optimizer was built with."""
        return self._members

    @property
    def matrix_workers(self) -> Mapping[int, MatrixWorker]:
        """By unit of the layout, what works on its matrices; empty before the first step."""
        return self._workers

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
            binding = self._bound()
        except NotYet:
            return loss
        if not binding.sharded and not _finite(self.param_groups):
            self.skipped_steps += 1  # under ZeRO, DeepSpeed decides this before it calls
            return loss
        scratch = Scratch()  # for this call only: nothing but state outlives a step
        for group in self.param_groups:
            if group["params"]:
                self._step_unit(binding, group, scratch)
        return loss

    def _bound(self) -> Binding:
        """The binding behind the tensors of this call, made at the first one."""
        binding = self._binding
        tensors = [t for group in self.param_groups for t in group["params"]]
        if binding is None or any(binding.unit_of(t) is None for t in tensors):
            binding = self._bind()
        return binding

    def _bind(self) -> Binding:
        if inspect.unwrap(type(self).step) is not inspect.unwrap(ZeroOptimizer.step):
            raise RuntimeError(
                f"{type(self).__name__} overrides step(): ds_optim's optimizers step whole layouts and must not "
                "be overridden; register a rule instead"
            )
        binding = bind(self, self._members, self._all_groups)
        self._workers = self._plan(binding)
        plans = tuple((unit, worker.digest()) for unit, worker in sorted(self._workers.items()))
        meant = (type(self).__name__, binding.layout.digest(), plans)
        if len(set(binding.comm.gather_objects(meant))) != 1:
            raise RuntimeError(
                "the ranks disagree on the layout or the exchange of matrices: give every rank the same model, "
                "parameter groups, optimizer JSON and, on mixed hardware, an explicit polar.dtype"
            )
        self._binding = binding
        # All units now: DeepSpeed links the state of all groups after the first group's step.
        for unit, tensors in enumerate(binding.tensors):
            group = self._all_groups[binding.layout.units[unit].group]
            for tensor in tensors:
                self._init_state(group, tensor)
        return binding

    def _plan(self, binding: Binding) -> dict[int, MatrixWorker]:
        """A worker for each unit whose rule may ask for matrices."""
        workers = {}
        for number, unit in enumerate(binding.layout.units):
            if RULES[self._all_groups[unit.group]["rule"]].matrices:
                workers[number] = MatrixWorker(
                    unit,
                    binding.members[number],
                    binding.comm,
                    polar=self._polar.resolve(binding.device),
                    device=binding.device,
                    bucket_mb=self._exchange["bucket_mb"],
                    overlap=self._exchange["overlap"],
                )
        return workers

    def _init_state(self, group: Group, tensor: Tensor) -> None:
        state = self.state[tensor]
        for key in RULES[group["rule"]].buffers:
            if key not in state:
                state[key] = torch.zeros_like(tensor, memory_format=torch.contiguous_format).detach()
        state.setdefault(STEP, 0)

    def _step_unit(self, binding: Binding, group: Group, scratch: Scratch) -> None:
        """What one flat partition (or, unsharded, one group of parameters) is due."""
        tensors: list[Tensor] = group["params"]
        live = [t for t in tensors if t.grad is not None]
        if not live:
            return
        if binding.sharded and len(live) != len(tensors):
            raise RuntimeError("ZeRO called step() without a gradient in the flat partition: nothing was changed")
        step = max(int(self.state[t][STEP]) for t in live)
        update = RULES[group["rule"]].update(group, step)
        if isinstance(update, MatrixUpdate):
            unit = binding.unit_of(tensors[0])
            assert unit is not None
            self._matrix_step(self._workers[unit], tensors, update, scratch)
        else:
            for tensor in live:
                self._elementwise_step(tensor, update, scratch)
        for tensor in live:
            self.state[tensor][STEP] = step + 1

    def _elementwise_step(self, tensor: Tensor, update: SignUpdate | AdamWUpdate, scratch: Scratch) -> None:
        p, g = _flat(tensor), _gradient(tensor)
        state = self.state[tensor]
        m = _flat(state[MOMENTUM]) if MOMENTUM in state else None
        if isinstance(update, SignUpdate):
            sign_step(p, m, g, blend=update.blend, lr=update.lr, decay=update.decay, scratch=scratch)
        else:
            assert m is not None
            adamw_step(
                p,
                m,
                _flat(state[SECOND_MOMENT]),
                g,
                lr=update.lr,
                betas=update.betas,
                eps=update.eps,
                decay=update.decay,
                step=update.step,
                scratch=scratch,
            )

    def _matrix_step(
        self, worker: MatrixWorker, tensors: Sequence[Tensor], update: MatrixUpdate, scratch: Scratch
    ) -> None:
        """Blend straight into the messages and apply straight from them: g is never written."""
        parameters = [_flat(t) for t in tensors]
        gradients = [_gradient(t) if t.grad is not None else None for t in tensors]
        momenta = [_flat(self.state[t][MOMENTUM]) for t in tensors]

        def fill(piece: Slice, message: Tensor) -> None:
            gradient = gradients[piece.tensor]
            assert gradient is not None
            blend_into(message, _run(momenta[piece.tensor], piece), _run(gradient, piece), update.blend, scratch)

        def apply(piece: Slice, result: Tensor) -> None:
            apply_update(
                _run(parameters[piece.tensor], piece),
                result,
                lr=update.lr,
                decay=update.decay,
                scale=worker.scale(piece.param, update.scale),
                scratch=scratch,
            )

        absent = frozenset(i for i, gradient in enumerate(gradients) if gradient is None)
        worker.run(fill, apply, update.scale, absent)


def _run(flat: Tensor, piece: Slice) -> Tensor:
    return flat[piece.offset : piece.offset + piece.numel]


def _flat(tensor: Tensor) -> Tensor:
    """A tensor as a vector over the same memory."""
    return tensor.detach().view(-1)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.detach().reshape(-1)


def _finite(groups: Sequence[Group]) -> bool:
    """Whether every gradient is: the ranks hold the same bits here, so they agree without asking."""
    gradients = [t.grad for group in groups for t in group["params"] if t.grad is not None]
    return all(bool(torch.isfinite(g).all()) for g in gradients)
