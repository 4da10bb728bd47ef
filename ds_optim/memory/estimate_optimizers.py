"""What an optimizer keeps for each of a model's parameters, as data that an estimate adds up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import Shape
from ds_optim.matrix.views import MatrixView
from ds_optim.memory.estimate_model import ModelShape, Parameter
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.optimizers.checks import check_choice
from ds_optim.optimizers.options import EXCHANGE_DEFAULTS, check_exchange
from ds_optim.optimizers.registry import DESCRIBED
from ds_optim.optimizers.routing import MEMBERS, ROLES, ROUTING_OPTIONS
from ds_optim.optimizers.rules import FRACTION, MOMENTUM, RULES, SECOND_MOMENT
from ds_optim.sharding.binding import Member
from ds_optim.zero.config import DEEPSPEED_PREFIX, canonical_type, check_type

_FP32 = 4
_TWO = (MOMENTUM, SECOND_MOMENT)
#: Optimizers that are not this package's: the fp32 buffers that they keep, by the names under which they do.
_THEIRS: Mapping[str, tuple[str, ...]] = {
    "adam": _TWO,
    "adamw": _TWO,
    "nadam": _TWO,
    "radam": _TWO,
    "lamb": _TWO,
    "lion": (MOMENTUM,),
    "adagrad": ("sum",),
    "rmsprop": ("square_avg",),
    "adamax": (MOMENTUM, "exp_inf"),
    "adadelta": ("square_avg", "acc_delta"),
}
_MUON_EXCLUDED = ("embed", "lm_head")


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One parameter group.

    buffers: bytes an element of each state buffer. int8: momentum is int8, with one fp32 scale for each block.
    shape: what the group's matrices travel for; None where they do not. scalar: bytes for each parameter.
    rows: keys of what is kept in fp32 for each row of a matrix. fraction: of the rows of a matrix, what a step takes.
    whole: DeepSpeed's Muon at stages 1 and 2, which keeps a buffer of every whole matrix that a partition touches.
    """

    parameters: tuple[Parameter, ...]
    buffers: Mapping[str, int]
    int8: bool = False
    shape: Shape | None = None
    scalar: int = 0
    rows: tuple[str, ...] = ()
    fraction: float = 1.0
    whole: bool = False

    @property
    def over(self) -> int:
        """Among how many ranks its experts are dealt out; 1 for what all ranks hold."""
        return self.parameters[0].over

    @cached_property
    def views(self) -> dict[str, MatrixView]:
        """Of its matrices, by the parameter's name."""
        return {parameter.name: parameter.view for parameter in self.parameters if parameter.view is not None}


@dataclass(frozen=True, kw_only=True)
class OptimizerPlan:
    """An optimizer over a model: its groups, and how its matrices travel."""

    name: str
    momentum_dtype: str
    groups: tuple[GroupPlan, ...]
    step_scalar: int = 0
    """Bytes of the step count of each tensor that the optimizer steps."""
    polar: PolarSpec = field(default_factory=PolarSpec)
    bucket_mb: float = EXCHANGE_DEFAULTS["bucket_mb"]
    overlap: bool = EXCHANGE_DEFAULTS["overlap"]
    share: bool | str | int = EXCHANGE_DEFAULTS["share"]
    ours: bool = True
    cautious: bool = False
    """Whether old weights are kept, a chunk at a time, to decay by."""
    kernels: bool = True
    """Whether all rules are this package's, which have kernels on a GPU."""


def takes_momentum_dtype(name: str) -> bool:
    """Whether an optimizer keeps one buffer, which may be stored in fewer bits."""
    check_type(name)
    described = DESCRIBED.get(canonical_type(name))
    return described is not None and described.narrow


def plan_optimizer(
    model: ModelShape,
    name: str,
    params: Mapping[str, Any] | None = None,
    *,
    momentum_dtype: str = "float32",
    weights: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> OptimizerPlan:
    """What ``name`` with these JSON parameters keeps for the model's parameters.

    Args:
        weights, device: what the model computes in and where, for what ``polar`` leaves to them.

    Raises:
        UserError: an unknown optimizer, a mistake in its parameters, or a momentum dtype that it cannot have.
    """
    check_type(name)
    check_choice("momentum_dtype", momentum_dtype, DTYPES)
    routing = {key: value for key, value in (params or {}).items() if key in ROUTING_OPTIONS}
    params = {key: value for key, value in (params or {}).items() if key not in ROUTING_OPTIONS}
    kind = canonical_type(name)
    if kind not in OPTIMIZERS:
        if momentum_dtype != "float32":
            raise UserError(f"{name} is not ds_optim's and keeps fp32: momentum_dtype {momentum_dtype!r} is not for it")
        return _theirs(model, name, params, weights)
    if momentum_dtype != "float32":
        params = {**params, "momentum_dtype": momentum_dtype}
    model = model.routed(**routing) if routing else model
    groups: list[dict[str, Any]] = []
    chosen = {role: tuple(p for p in model.parameters if p.role == role) for role in ROLES}
    for role, parameters in chosen.items():
        empty = (torch.empty(p.shape, dtype=torch.float32, device="meta") for p in parameters)
        members = [
            Member(p.spec, torch.nn.Parameter(t), p.view, derived=p.derived)
            for p, t in zip(parameters, empty, strict=True)
        ]
        if members:
            groups.append({"params": [m.parameter for m in members], "name": role, "role": role, MEMBERS: members})
    known = {p.name: p for p in model.parameters}
    # The class itself checks the parameters and routes rules to groups; on the meta device it holds no memory.
    optimizer = OPTIMIZERS[kind](groups, **params)
    dtype = params.get("momentum_dtype", "float32")
    exchange = check_exchange(params.get("exchange", {}))
    return OptimizerPlan(
        name=name,
        momentum_dtype=dtype,
        groups=_by_ranks(
            _ours(group, [replace(known[m.spec.name], view=m.view) for m in members], dtype)
            for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
        ),
        polar=optimizer.polar.resolve(torch.device(device), weights),
        bucket_mb=exchange["bucket_mb"],
        overlap=exchange["overlap"],
        share=exchange["share"],
        cautious=bool(params.get("cautious_decay", False)),
        kernels=all(RULES[g["rule"]].update.__module__.startswith("ds_optim.") for g in optimizer.param_groups),
    )


def _ours(group: Mapping[str, Any], parameters: Sequence[Parameter], momentum_dtype: str) -> GroupPlan:
    rule = RULES[group["rule"]]
    return GroupPlan(
        parameters=tuple(parameters),
        buffers={key: dtype.itemsize for key, dtype in rule.element_dtypes(DTYPES[momentum_dtype]).items()},
        int8=rule.narrow and momentum_dtype == "int8",
        shape=rule.shape,
        scalar=8 if rule.scalar else 0,
        rows=rule.rows,
        fraction=group.get(FRACTION, 1.0),
    )


def _theirs(model: ModelShape, name: str, params: Mapping[str, Any], weights: torch.dtype) -> OptimizerPlan:
    """DeepSpeed's and torch's own, over all parameters in the model's order."""
    kind = name.removeprefix(DEEPSPEED_PREFIX).lower()
    if kind == "muon":
        return _their_muon(model, name, weights)
    if kind == "sgd":
        buffers: tuple[str, ...] = ("momentum_buffer",) if params.get("momentum") else ()
    elif kind in _THEIRS:
        buffers = _THEIRS[kind]
    else:
        raise UserError(f"what {name!r} keeps is not known here: estimate one of {', '.join([*OPTIMIZERS, *_THEIRS])}")
    group = GroupPlan(parameters=model.trainable, buffers=dict.fromkeys(buffers, _FP32))
    groups = _by_ranks([group])
    return OptimizerPlan(name=name, momentum_dtype="float32", groups=groups, step_scalar=_FP32, ours=False)


def _by_ranks(groups: Iterable[GroupPlan]) -> tuple[GroupPlan, ...]:
    """Experts in groups of their own, as DeepSpeed has them: fewer ranks hold the same ones."""
    found = []
    for group in groups:
        for over in dict.fromkeys(parameter.over for parameter in group.parameters):
            found.append(replace(group, parameters=tuple(p for p in group.parameters if p.over == over)))
    return tuple(found)


def _their_muon(model: ModelShape, name: str, weights: torch.dtype) -> OptimizerPlan:
    """Momentum in the model's dtype for whole matrices, Adam for the rest."""
    matrices = [p for p in model.trainable if _their_matrix(p)]
    rest = [p for p in model.trainable if not _their_matrix(p)]
    groups = (
        GroupPlan(parameters=tuple(matrices), buffers={"momentum_buffer": weights.itemsize}, whole=True),
        GroupPlan(parameters=tuple(rest), buffers=dict.fromkeys(_TWO, _FP32)),
    )
    return OptimizerPlan(name=name, momentum_dtype=str(weights).removeprefix("torch."), groups=groups, ours=False)


def _their_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) >= 2 and not any(word in parameter.name.lower() for word in _MUON_EXCLUDED)
