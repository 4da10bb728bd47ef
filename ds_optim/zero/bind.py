"""The layout behind a client optimizer's tensors, as DeepSpeed 0.19.8 made it.

The layout has a closed form; the parameters carry their own addresses after ``deepspeed.initialize``. The
binder builds the first, checks it against the second and against the values of the weights, and lets the
ranks compare notes before anyone proceeds: whatever one rank finds wrong is raised on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.sharding.binding import Binding, Groups, Member, NotYet, bind_unsharded, experts_of, is_optimized, taken
from ds_optim.sharding.comm import Comm
from ds_optim.zero.agree import agree_on_engine, raise_everywhere
from ds_optim.zero.announce import announce_routes
from ds_optim.zero.caller import Caller, find_caller, tensor_ranks
from ds_optim.zero.experts import check_alone, check_live
from ds_optim.zero.partitions import FREEZE_HINT, SYNC_HINT, Comms, attribute, bind_stage3, bind_stages_1_2, same
from ds_optim.zero.pipeline import agree_across_stages, all_ranks, check_patterns, tied_problem
from ds_optim.zero.schedulers import prepare_scheduler
from ds_optim.zero.sequence import check_sequence
from ds_optim.zero.support import check_engine, check_parameters, check_wrapper
from ds_optim.zero.swapped import Files, check_buffers, check_gradients
from ds_optim.zero.tensor import agree_on_shards, everyone, with_shards

_FOREIGN = (
    "the parameter groups hold tensors that DeepSpeed's ZeRO did not make: ds_optim cannot tell where their matrices "
    "lie. Leave optimizer.param_groups[...]['params'] alone after deepspeed.initialize"
)
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where the wrappers of stages 1 and 2 keep their flat partitions."""


def bind_zero(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups) -> Binding:
    """Bind to what ZeRO-1/2, ``BF16_Optimizer`` or ZeRO-3 made, or to parameters that are not sharded.

    Raises:
        NotYet: DeepSpeed is still initializing (stage 0 with 16-bit weights steps once, on zeros).
        UserError: a setting that is not supported, with what to write instead, on every rank.
        RuntimeError: the memory is not what the layout says, on every rank.
    """
    caller = find_caller(optimizer)
    if caller is not None and caller.method == "initialize_optimizer_states":
        raise NotYet
    engine = None if caller is None else caller.engine
    tensor, members, fault = _shards_of(optimizer, members, engine)
    trained = taken(members, groups) if len(groups) == len(members) else [list(group) for group in members]
    stage = _stage_of(trained, groups, caller)
    first = _first(trained) if stage else None
    comm = _comm(stage, first, caller)
    all_of_it = all_ranks(engine) or everyone(tensor, comm)
    problem = fault or _settings_problem(caller, trained) or _groups_problem(stage, trained, groups)
    raise_everywhere(problem or (_left_out(members, trained) if stage else None), all_of_it)
    if engine is not None:
        agree_on_engine(engine, all_of_it)
        _agree_on_stages(optimizer, trained, groups, engine, comm)
    peaks = _scheduler_prepared(optimizer, groups, caller, comm)
    if first is None:
        raise_everywhere(_copies_problem(trained, groups), everyone(tensor, comm))
        binding = replace(bind_unsharded(members, groups), replicas=comm)
    else:
        binding = _bind_partitions(trained, comm, groups, stage, caller, tensor)
        unknown = any(binding.unit_of(t) is None for group in optimizer.param_groups for t in group["params"])
        raise_everywhere(RuntimeError(_FOREIGN) if unknown else None, comm)
    if tensor is not None:
        agree_on_shards(tensor, comm, binding.members, None)
    files = _files(binding, optimizer, groups, engine) if stage == 3 else None
    announce_routes(optimizer, groups, peaks)
    return replace(binding, tensor=tensor, files=files)


def _bind_partitions(
    trained: Sequence[Sequence[Member]],
    comm: Comm,
    groups: Groups,
    stage: int,
    caller: Caller | None,
    tensor: Comm | None,
) -> Binding:
    """Bind to what ZeRO made; what one group of data-parallel ranks finds wrong, those that wait for it hear too."""
    try:
        comms = _comms(stage, trained, comm)
        if stage == 3:
            return bind_stage3(trained, comms)
        return bind_stages_1_2(trained, comms, groups, stage, None if caller is None else caller.wrapper)
    except (UserError, RuntimeError) as problem:
        if tensor is not None:
            agree_on_shards(tensor, comm, trained, problem)
        raise


def _files(binding: Binding, optimizer: torch.optim.Optimizer, groups: Groups, engine: Any) -> Files | None:
    """What is to be known of sub-groups that lie in files between steps; None where none does."""
    zero: Any = binding.members[0][0].parameter._z3_optimizer  # type: ignore[attr-defined]
    files = Files(zero, optimizer, engine, binding.members)
    if not files.units:
        return None
    problem = None
    try:
        files.check()
        check_buffers(zero, binding.layout, groups)
        check_gradients(zero, binding.layout)
    except UserError as error:
        problem = error
    raise_everywhere(problem, binding.comm)
    return files


def _shards_of(
    optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], engine: Any
) -> tuple[Comm | None, Sequence[Sequence[Member]], UserError | None]:
    """The ranks that hold other shards, the members as they lie here, and what speaks against them."""
    tensor = None
    try:
        tensor = tensor_ranks(engine)
        check_live(engine, members)
        members = with_shards(members, tensor, engine)
        check_alone(engine, tensor, members)
    except UserError as problem:
        return tensor, members, problem
    if tensor is not None and isinstance(optimizer, ZeroOptimizer):
        optimizer.hold(members)
    return tensor, members, None


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO steps a parameter, by what it left on it, and on all of the model's at stage 3."""
    zero: Any = getattr(parameter, "_z3_optimizer", None)
    if zero is not None:
        return zero.get_param_id(parameter) in attribute(zero, "grad_position")
    return hasattr(parameter, "_hp_mapping")


def recognize_engine(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups) -> bool:
    """At the end of ``deepspeed.initialize``: refuse what is not supported, and give the scheduler its lists.

    Returns:
        Whether it was that call; any other moves nothing, and takes no part in a collective.

    Raises:
        UserError: a setting that is not supported, with what to write instead, on every rank.
    """
    caller = find_caller(optimizer)
    if caller is None or not caller.building:
        return False
    comm = Comm.of_group(getattr(caller.engine, "seq_data_parallel_group", None))
    tensor, members, fault = _shards_of(optimizer, members, caller.engine)
    all_of_it = all_ranks(caller.engine) or everyone(tensor, comm)
    trained = taken(members, groups)
    raise_everywhere(fault or _settings_problem(caller, trained), all_of_it)
    agree_on_engine(caller.engine, all_of_it)
    _agree_on_stages(optimizer, trained, groups, caller.engine, comm)
    announce_routes(optimizer, groups, _scheduler_prepared(optimizer, groups, caller, comm))
    return True


def _agree_on_stages(
    optimizer: torch.optim.Optimizer, trained: Sequence[Sequence[Member]], groups: Groups, engine: Any, comm: Comm
) -> None:
    """What the stages of a pipeline must have alike; collective over all of them."""
    everyone = all_ranks(engine)
    if everyone is None or not isinstance(optimizer, ZeroOptimizer):
        return
    check_patterns(engine.module, everyone)
    agree_across_stages(optimizer, trained, groups, everyone)
    raise_everywhere(tied_problem(trained, optimizer.identity().momentum_dtype, comm), everyone)


def _scheduler_prepared(
    optimizer: torch.optim.Optimizer, groups: Groups, caller: Caller | None, comm: Comm
) -> list[float] | None:
    """The peaks of the groups' rates, where the engine's scheduler tells them; a problem is raised on every rank."""
    peaks, problem = None, None
    try:
        if caller is not None and caller.engine is not None and isinstance(optimizer, ZeroOptimizer):
            peaks = prepare_scheduler(caller.engine, optimizer, groups)
    except UserError as error:
        problem = error
    raise_everywhere(problem, comm)
    return peaks


def _stage_of(trained: Sequence[Sequence[Member]], groups: Groups, caller: Caller | None) -> int:
    """The stage by what the groups hold, and then by what DeepSpeed left on the parameters.

    Marks stay on parameters after their engine is gone: whole tensors in the groups are nobody's partitions, and stage
    3 is that of the engine whose partitions they are (whose groups are empty between steps).
    """
    parameters = [m.parameter for group in trained for m in group]
    held = [t for group in groups for t in group["params"]]
    for zero in {id(z): z for z in (getattr(p, "_z3_optimizer", None) for p in parameters) if z is not None}.values():
        own = {id(flat) for flat in attribute(zero, "fp32_partitioned_groups_flat")}
        if not held or any(id(t) in own for t in held):
            return 3
    if not any(hasattr(p, "_hp_mapping") for p in parameters) or _are_whole(trained, groups, caller):
        return 0
    return 2 if caller is not None and getattr(caller.wrapper, "partition_gradients", False) else 1


def _are_whole(trained: Sequence[Sequence[Member]], groups: Groups, caller: Caller | None) -> bool:
    """Whether the groups hold the parameters, or copies of them that are no partitions of the wrapper's."""
    partitions = caller is not None and any(hasattr(caller.wrapper, name) for name in _PARTITIONS)
    for group, members in zip(groups, trained, strict=False):
        tensors = [t for t in group["params"] if t.numel()]
        stepped = [m for m in members if m.spec.numel]
        copies = not partitions and [tuple(t.shape) for t in tensors] == [m.spec.shape for m in stepped]
        if not copies and any(t is not m.parameter for t, m in zip(tensors, stepped, strict=False)):
            return False
    return True


def _first(trained: Sequence[Sequence[Member]]) -> torch.nn.Parameter:
    """A parameter that all ranks share, if there is one."""
    firsts = [group[0].parameter for group in trained if group]
    return next((p for p in firsts if experts_of(p) is None), firsts[0])


def _comm(stage: int, first: torch.nn.Parameter | None, caller: Caller | None) -> Comm:
    """The data-parallel group of the parameters; without shards, the engine's, if there is one."""
    if first is not None:
        return _shared_by(stage, first)
    engine = caller.engine if caller is not None else None
    return Comm.of_group(getattr(engine, "seq_data_parallel_group", None))


def _shared_by(stage: int, parameter: Any) -> Comm:
    return Comm.of_group(parameter.ds_process_group if stage == 3 else parameter._dp_group)


def _comms(stage: int, trained: Sequence[Sequence[Member]], comm: Comm) -> Comms:
    """The same of each group of experts."""
    firsts = {number: group[0].parameter for number, group in enumerate(trained) if group}
    return Comms(comm, {n: _shared_by(stage, p) for n, p in firsts.items() if experts_of(p) is not None})


def _settings_problem(caller: Caller | None, trained: Sequence[Sequence[Member]]) -> UserError | None:
    try:
        check_parameters([(m.spec.name, m.parameter) for group in trained for m in group])
        if caller is not None:
            check_wrapper(caller.wrapper)
            if caller.engine is not None:
                check_engine(caller.engine)
                _check_parallel(caller.engine)
    except UserError as error:
        return error
    return None


def _check_parallel(engine: Any) -> None:
    if not isinstance(engine.config, Mapping):
        return
    sharing = check_sequence(engine.config, engine.mpu, engine.mesh_device)
    if sharing > 1 and engine.has_moe_layers:
        raise UserError("DeepSpeed's MoE layers are not supported where ranks share a sequence: pass no mpu")


def _groups_problem(stage: int, trained: Sequence[Sequence[Member]], groups: Groups) -> RuntimeError | None:
    if len(groups) != len(trained):
        return RuntimeError(
            f"the optimizer was built with {len(trained)} parameter groups and has {len(groups)}: build it from "
            "ds_optim.param_groups(model) over all that it is to train, and add no group later"
        )
    if stage in (1, 2) and any(len(g["params"]) != 1 for g, m in zip(groups, trained, strict=True) if m):
        return RuntimeError(_FOREIGN)
    return None


def _left_out(members: Sequence[Sequence[Member]], trained: Sequence[Sequence[Member]]) -> UserError | None:
    """DeepSpeed trains nothing that was frozen when the engine was built, and says nothing of it."""
    there = {id(m.parameter) for group in trained for m in group}
    for member in (m for group in members for m in group):
        if id(member.parameter) not in there and is_optimized(member.parameter):
            return UserError(
                f"{member.spec.name} was frozen when deepspeed.initialize was called and is trainable now, and would "
                f"not be trained: {FREEZE_HINT}. A parameter that gets no gradient in some steps needs no freezing"
            )
    return None


def _copies_problem(trained: Sequence[Sequence[Member]], groups: Groups) -> RuntimeError | None:
    """Where nothing is sharded, a tensor that is not the parameter must be a copy of it.

    Shapes are compared by ``bind_unsharded``.
    """
    for group, members in zip(groups, trained, strict=True):
        if len(group["params"]) != len(members):
            return RuntimeError(f"the parameter group {group.get('name')!r} holds tensors that are not the model's")
        for tensor, member in zip(group["params"], members, strict=True):
            own = member.parameter.detach()
            if tensor is not member.parameter and tensor.shape == own.shape and not same(tensor, own):
                return RuntimeError(f"the fp32 weights of {member.spec.name} are not the model's; {SYNC_HINT}")
    return None
