"""The layout behind a client optimizer's tensors, as DeepSpeed 0.19.8 made it.

The layout has a closed form; the parameters carry their own addresses after ``deepspeed.initialize``. The
binder builds the first, checks it against the second and against the values of the weights, and lets the
ranks compare notes before anyone proceeds: whatever one rank finds wrong is raised on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optim.sharding.binding import Binding, Groups, Member, NotYet, is_optimized
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Layout, ParamSpec, Slice, Unit, build_layout
from ds_optim.zero.caller import find_caller
from ds_optim.zero.support import check_parameters, check_wrapper

_SYNC_HINT = (
    "if weights were changed in place after deepspeed.initialize, call engine.optimizer.refresh_fp32_params() first"
)

Address = tuple[int, int, int]
"""(start in the parameter, elements, offset in the flat partition) of what this rank holds."""


def bind_zero(
    optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups
) -> Binding | None:
    """Bind to what ZeRO-1/2, ``BF16_Optimizer`` or ZeRO-3 made; None where the parameters are not sharded.

    Raises:
        NotYet: DeepSpeed is still initializing (stage 0 with 16-bit weights steps once, on zeros).
        UserError: a setting that is not supported, with what to write instead.
        RuntimeError: the memory is not what the layout says, on every rank.
    """
    caller = find_caller(optimizer)
    if caller is not None and caller.method == "initialize_optimizer_states":
        raise NotYet
    trained = [[m for m in group if is_optimized(m.parameter)] for group in members]
    parameters = [m.parameter for group in trained for m in group]
    check_parameters([(m.spec.name, m.parameter) for group in trained for m in group])
    if caller is not None:
        check_wrapper(caller.wrapper)
    if any(hasattr(p, "_z3_optimizer") for p in parameters):
        return _bind_stage3(trained)
    if any(hasattr(p, "_hp_mapping") for p in parameters):
        return _bind_stages_1_2(trained, groups, 2 if getattr(caller.wrapper, "partition_gradients", False) else 1
                                if caller else 1)
    return None


def _bind_stages_1_2(trained: Sequence[Sequence[Member]], groups: Groups, stage: int) -> Binding:
    occupied = [(number, group) for number, group in enumerate(trained) if group]
    first = occupied[0][1][0].parameter
    comm = Comm.of_group(first._dp_group)  # type: ignore[attr-defined]
    flats = [group["params"][0] for group in groups]

    def local_address(unit: Unit, param: int, member: Member) -> Address | None:
        mapping = member.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return there.start, there.numel, here.start

    # DeepSpeed aligns parameters to 16 bytes if asked to; the addresses tell which of the two it was.
    alignments = sorted({1, 16 // math.gcd(16, first.element_size())})
    specs = [[m.spec for m in group] for group in trained]
    layouts = [
        build_layout(specs, stage=stage, world_size=comm.world_size, param_alignment=a) for a in alignments
    ]
    tensors = [[flats[unit.group]] for unit in layouts[0].units]
    members = [list(trained[unit.group]) for unit in layouts[0].units]
    problems = [_find_problem(layout, members, tensors, comm, local_address) for layout in layouts]
    layout = _agree(layouts, problems, comm)
    _check_values(layout, members, tensors, comm, lambda m: m.parameter.detach().reshape(-1))
    return Binding(layout, comm, _work_device(comm, tensors[0][0], first), tensors, members)


def _bind_stage3(trained: Sequence[Sequence[Member]]) -> Binding:
    first = next(m.parameter for group in trained for m in group)
    zero: Any = first._z3_optimizer  # type: ignore[attr-defined]
    comm = Comm.of_group(first.ds_process_group)  # type: ignore[attr-defined]
    flats: list[Tensor] = _attribute(zero, "fp32_partitioned_groups_flat")
    positions = _attribute(zero, "grad_position")
    layout = build_layout(
        [[m.spec for m in group] for group in trained],
        stage=3,
        world_size=comm.world_size,
        sub_group_size=_attribute(zero, "sub_group_size"),
    )
    queue = [m for group in trained for m in group]
    members: list[list[Member]] = []
    for unit in layout.units:
        members.append(queue[: len(unit.params)])
        queue = queue[len(unit.params) :]

    def local_address(unit: Unit, param: int, member: Member) -> Address | None:
        number, offset, shard = positions[zero.get_param_id(member.parameter)]
        start = min(comm.rank * shard, member.spec.numel)
        held = min(shard, member.spec.numel - start)
        if layout.units[number] is not unit:
            return -1, -1, -1
        return (start, held, offset) if held else None

    if len(flats) == len(layout.units):
        tensors = [[flat] for flat in flats]
        problem = _find_problem(layout, members, tensors, comm, local_address)
    else:
        tensors = []
        problem = f"ZeRO-3 made {len(flats)} sub-groups where the closed form has {len(layout.units)}"
    _agree([layout], [problem], comm)
    _check_values(layout, members, tensors, comm, lambda m: m.parameter.ds_tensor.detach().reshape(-1))  # type: ignore[attr-defined]
    return Binding(layout, comm, _work_device(comm, flats[0], first), tensors, members)


def _attribute(wrapper: Any, name: str) -> Any:
    if not hasattr(wrapper, name):
        raise RuntimeError(
            f"DeepSpeed's {type(wrapper).__name__} has no {name!r}: this release lays memory out in a way that "
            "ds_optim does not know; install a version in the declared range (see ds_optim's pyproject.toml)"
        )
    return getattr(wrapper, name)


def _find_problem(
    layout: Layout,
    members: Sequence[Sequence[Member]],
    tensors: Sequence[Sequence[Tensor]],
    comm: Comm,
    address: Callable[[Unit, int, Member], Address | None],
) -> str | None:
    """The first disagreement between the closed form and the addresses on this rank."""
    for unit, unit_members, (flat,) in zip(layout.units, members, tensors, strict=True):
        if flat.numel() != unit.partition_numel:
            return f"a flat partition holds {flat.numel()} elements where the closed form has {unit.partition_numel}"
        for param, member in enumerate(unit_members):
            if not hasattr(member.parameter, "_hp_mapping") and unit.cut == "flat":
                return f"{member.spec.name} has no address in ZeRO's partitions"
            there, here = address(unit, param, member), _address(unit.slice_of(param, comm.rank))
            if there != here:
                return (
                    f"{member.spec.name} lies at {there} (start, elements, offset) where the closed form has {here} "
                    "(round_robin_gradients is not supported: set it to false)"
                )
    return None


def _address(piece: Slice | None) -> Address | None:
    return None if piece is None else (piece.start, piece.numel, piece.offset)


def _agree(layouts: Sequence[Layout], problems: Sequence[str | None], comm: Comm) -> Layout:
    """The first layout that fits on every rank.

    Raises:
        RuntimeError: on every rank, with the first rank's reason, if none does or the ranks mean different ones.
    """
    everywhere = comm.gather_objects([(layout.digest(), p) for layout, p in zip(layouts, problems, strict=True)])
    for number, layout in enumerate(layouts):
        if all(candidates[number] == (layout.digest(), None) for candidates in everywhere):
            return layout
    for rank, candidates in enumerate(everywhere):
        if candidates[0][1] is not None:
            raise RuntimeError(f"ds_optim cannot step this layout (rank {rank}): {candidates[0][1]}")
    raise RuntimeError("the ranks disagree on the model's parameters: build the same model on every rank")


def _check_values(
    layout: Layout,
    members: Sequence[Sequence[Member]],
    tensors: Sequence[Sequence[Tensor]],
    comm: Comm,
    weights: Callable[[Member], Tensor],
) -> None:
    """Compare the master slices, cast down, with the model's own weights: addresses alone may both be wrong."""
    problem: str | None = None
    for unit, unit_members, (flat,) in zip(layout.units, members, tensors, strict=True):
        for piece in unit.slices(comm.rank):
            member = unit_members[piece.param]
            own = weights(member)
            start = 0 if unit.cut == "each" else piece.start
            own = own[start : start + piece.numel]
            master = flat.detach()[piece.offset : piece.offset + piece.numel].to(own.dtype)
            if problem is None and not torch.equal(master.to(own.device).nan_to_num(), own.nan_to_num()):
                problem = f"the master weights of {member.spec.name} are not the model's; {_SYNC_HINT}"
    for rank, found in enumerate(comm.gather_objects(problem)):
        if found is not None:
            raise RuntimeError(f"ds_optim cannot step this layout (rank {rank}): {found}")


def _work_device(comm: Comm, flat: Tensor, parameter: torch.nn.Parameter) -> torch.device:
    """Matrices are worked on where the model lives, which is not where an offloaded partition does."""
    return comm.device(parameter.device if parameter.device.type != "meta" else flat.device)


def specs_of(members: Sequence[Sequence[Member]]) -> list[list[ParamSpec]]:
    """The specs of what DeepSpeed will train, group by group: what a closed form starts from."""
    return [[m.spec for m in group if is_optimized(m.parameter)] for group in members]
