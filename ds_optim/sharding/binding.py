"""What ties an optimizer to the memory it steps: the layout, the ranks, and this rank's tensors.

An optimizer is built from a model's parameters and later finds other tensors in its groups: ZeRO puts flat
partitions there. A binding says which unit of the layout each of them is. How it is found under DeepSpeed
is the business of ``ds_optim.zero``, which registers its binder here; this package knows only the case in
which nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.later import complete
from ds_optim.sharding.layout import Layout, ParamSpec, build_layout
from ds_optim.sharding.lines import Lines, lines_of


@dataclass(frozen=True)
class Member:
    """A model's parameter, as it was handed to the optimizer, and what was decided about it.

    reason: why it is no matrix, where that is not plain from its shape.
    derived: what its view was derived from, or why none was, where nobody has written one.
    """

    spec: ParamSpec
    parameter: torch.nn.Parameter
    view: MatrixView | None = None
    reason: str = ""
    derived: str = ""


class InFiles(Protocol):
    """What is to be known of flat partitions that are in memory only while they are stepped."""

    @property
    def units(self) -> frozenset[int]:
        """Which they are; their tensors are empty between their steps."""

    def check(self) -> None:
        """Raise before a step that would go on without what was saved."""

    def settle(self, number: int, tensor: Tensor, state: Mapping[str, Any]) -> None:
        """Put right what is in memory for a step of unit ``number``."""

    def release(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Between steps: keep nothing in memory that is another's by now."""


@dataclass
class Binding:
    """This rank's tensors, by unit of the layout.

    ``tensors[u]`` are the tensors of unit u: one flat partition under ZeRO, the parameters themselves where
    nothing is sharded. ``members[u]`` are its parameters in the order of ``layout.units[u].params``.
    ``device`` is where matrices are worked on. ``replicas`` are the ranks that hold all of the model each, where
    nothing is sharded. ``tensor`` are the ranks that hold the other shards of what tensor parallelism cut.
    ``experts``: by unit, the ranks that share its parameters, where these are experts. ``files``: of units that lie in
    files between steps.
    """

    layout: Layout
    comm: Comm
    device: torch.device
    tensors: list[list[Tensor]]
    members: list[list[Member]]
    replicas: Comm | None = None
    tensor: Comm | None = None
    experts: Mapping[int, Comm] = field(default_factory=dict)
    files: InFiles | None = None
    unit_by_tensor: dict[int, int] = field(init=False)
    _lines: dict[int, Lines] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # By identity, not by address: a swapped-out partition changes its storage and stays the same tensor.
        self.unit_by_tensor = {id(t): unit for unit, tensors in enumerate(self.tensors) for t in tensors}

    @property
    def peers(self) -> Comm:
        """The ranks that must choose alike."""
        return self.replicas or self.comm

    @property
    def differing(self) -> Comm | None:
        """The ranks that hold other shards or experts than this one; of what is not sharded, for experts."""
        if any(experts_of(member.parameter) is not None for members in self.members for member in members[:1]):
            return self.replicas
        return self.tensor

    def comm_of(self, unit: int) -> Comm:
        """The data-parallel group of a unit's parameters."""
        return self.experts.get(unit, self.comm)

    def lines_of(self, unit: int) -> Lines:
        """All slices that this rank holds of a unit, found once."""
        if unit not in self._lines:
            self._lines[unit] = lines_of(self.layout.units[unit], self.comm_of(unit).rank)
        return self._lines[unit]

    @property
    def in_files(self) -> frozenset[int]:
        """The units whose tensors are empty between their steps."""
        return frozenset() if self.files is None else self.files.units

    @property
    def sharded(self) -> bool:
        return self.layout.stage > 0

    def unit_of(self, tensor: Tensor) -> int | None:
        """The number of the unit that ``tensor`` belongs to; None for a tensor never seen."""
        return self.unit_by_tensor.get(id(tensor))


Groups = Sequence[dict[str, Any]]
Binder = Callable[[torch.optim.Optimizer, Sequence[Sequence[Member]], Groups], "Binding | None"]

IsPartitioned = Callable[[torch.nn.Parameter], bool]
EngineCheck = Callable[[torch.optim.Optimizer, Sequence[Sequence[Member]], Groups], bool]

_binders: list[tuple[Binder, IsPartitioned]] = []
_engine_checks: list[EngineCheck] = []


class NotYet(Exception):
    """The call is not a step of training: whoever wraps the optimizer is still setting it up."""


def register_binder(binder: Binder, is_partitioned: IsPartitioned) -> None:
    """Ask ``binder`` before assuming that nothing is sharded.

    It returns None where it does not recognize the parameters, and raises :class:`NotYet` for a call that
    must move nothing. ``is_partitioned`` tells of a parameter whether its elements are in partitions.
    """
    _binders.append((binder, is_partitioned))


def register_engine_check(check: EngineCheck) -> None:
    """Ask ``check`` whenever somebody reads the groups of an optimizer that has not been bound, until it says that
    this was the engine that is going to step it."""
    _engine_checks.append(check)


def is_read_by_engine(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups) -> bool:
    """Whether who reads the groups is the engine that is going to step the optimizer."""
    complete()
    return any([check(optimizer, members, groups) for check in _engine_checks])


def bind(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups) -> Binding:
    """Find the layout behind the tensors in ``groups``.

    Args:
        members: for each of ``groups`` the parameters that the optimizer was built with.
        groups: all parameter groups as they are now.
    """
    complete()
    for binder, _ in _binders:
        binding = binder(optimizer, members, groups)
        if binding is not None:
            return binding
    return bind_unsharded(members, groups)


def bind_unsharded(members: Sequence[Sequence[Member]], groups: Groups) -> Binding:
    """Every tensor in the groups is a whole parameter, or DeepSpeed's fp32 copy of one (stage 0, 16-bit)."""
    chosen: list[list[Member]] = []
    for group, candidates in zip(groups, taken(members, groups), strict=True):
        tensors = group["params"]
        shapes = [tuple(t.shape) for t in tensors]
        cut = next((m for m in candidates if m.parameter.shape != m.spec.shape), None)
        if cut is not None and hasattr(cut.parameter, "ds_shape") and any(t is cut.parameter for t in tensors):
            raise UserError(
                f"{cut.spec.name} lies in the shards of a ZeRO-3 engine that is gone: build the model anew and load "
                "its weights, or gather all parameters before the first step"
            )
        if shapes != [m.spec.shape for m in candidates]:
            raise RuntimeError(
                f"the tensors of parameter group {group.get('name')!r} are neither the model's parameters nor "
                "copies of them nor partitions that DeepSpeed's ZeRO made: ds_optim cannot tell where its "
                "matrices lie. Build the optimizer from ds_optim.param_groups(model) and hand it to "
                "deepspeed.initialize, or step it directly."
            )
        for tensor, member in zip(tensors, candidates, strict=True):
            _check_steppable(tensor, member.spec.name)
        chosen.append(list(candidates))
    layout = build_layout([[m.spec for m in group] for group in chosen], stage=0, world_size=1)
    tensors_by_unit = [list(group["params"]) for group, members_ in zip(groups, chosen, strict=True) if members_]
    device = tensors_by_unit[0][0].device if tensors_by_unit else torch.device("cpu")
    return Binding(
        layout=layout,
        comm=Comm(),
        device=device,
        tensors=tensors_by_unit,
        members=[group for group in chosen if group],
    )


def check_plain(tensor: Tensor, name: str) -> None:
    """Refuse what holds its values elsewhere than in memory of its own: kernels take addresses.

    A fake tensor stands for a plain one.

    Raises:
        UserError: with what to write instead.
    """
    kind = type(tensor)
    what = "sparse" if tensor.layout is not torch.strided else "nested" if tensor.is_nested else ""
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind.__name__ != "FakeTensor":
        what = f"a {kind.__name__}"
    elif getattr(tensor, "_is_flat_param", False):
        what = "a FlatParameter"
    elif getattr(tensor, "_fsdp_flattened", False):  # with use_orig_params: a Parameter that is this rank's slice
        what = "a slice of a FlatParameter"
    if what:
        raise UserError(
            f"{name} is {what} and no plain tensor: pass plain parameters, and shard the model with DeepSpeed's ZeRO "
            "(zero_optimization.stage 1 to 3) instead of FSDP or tensor parallelism"
        )


def check_gradients(binding: Binding) -> None:
    """Refuse, before any write, gradients that are no plain tensors, where the user's own code made them.

    Raises:
        UserError: with what to write instead.
    """
    for tensors, members in zip(binding.tensors, binding.members, strict=True):
        for tensor, member in zip(tensors, members, strict=True):
            if tensor.grad is None:
                continue
            if tensor.grad.layout is not torch.strided:
                raise UserError(
                    f"{member.spec.name} has a sparse gradient: make its layer with sparse=False, or write "
                    "p.grad = p.grad.to_dense() before the step"
                )
            check_plain(tensor.grad, f"the gradient of {member.spec.name}")


def taken(members: Sequence[Sequence[Member]], groups: Groups) -> list[list[Member]]:
    """Of each group the members that its tensors stand for, whatever has been frozen or unfrozen since.

    The parameters themselves tell, where the groups hold them, and else who took them into partitions. Fp32 copies
    (stage 0, 16-bit) tell nothing but their number: ask while DeepSpeed makes them.
    """
    complete()
    held = {id(tensor) for group in groups for tensor in group["params"]}
    for is_held in (lambda parameter: id(parameter) in held, *(is_partitioned for _, is_partitioned in _binders)):
        found = [[m for m in group if is_held(m.parameter)] for group in members]
        if any(found):
            return found
    return [
        list(own) if len(own) == len(group["params"]) else [m for m in own if is_optimized(m.parameter)]
        for own, group in zip(members, groups, strict=True)
    ]


def _check_steppable(tensor: Tensor, name: str) -> None:
    check_plain(tensor, name)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"{name} is {tensor.dtype} and nothing keeps fp32 master weights for it: train through DeepSpeed with "
            '"bf16" or "fp16", or keep the parameters in fp32 and use autocast'
        )
    if not tensor.is_contiguous():
        raise UserError(f"{name} is not contiguous in memory: use parameters in the default memory format")


def is_optimized(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed gives a parameter to an optimizer: trainable, with at least one element.

    So it is while an optimizer and an engine are built; what they took is asked of :func:`taken` afterwards.
    """
    return parameter.requires_grad and full_numel(parameter) > 0


def experts_of(parameter: torch.nn.Parameter) -> str | None:
    """DeepSpeed's name of the ranks that share an expert of one of its MoE layers; None for other parameters.

    A rank belongs to one set of ranks of each name, and knows other experts by the same names of parameters.
    """
    return str(parameter.group_name) if getattr(parameter, "allreduce", True) is False else None  # type: ignore[attr-defined]


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The parameter's whole shape, also where ``zero.Init`` has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
