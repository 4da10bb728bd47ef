"""Tensor parallelism as DeepSpeed 0.19.8 and Megatron's layers have it: which shard of which parameter a rank holds.

AutoTP cuts the model's parameters while an engine is built, in place, and leaves on each what it cut. Layers that are
written by hand carry Megatron's marks, and an ``mpu`` is given to the engine. What cannot be put together from what
these tell is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ds_optim.errors import UserError
from ds_optim.sharding.binding import Member, full_shape
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Shard
from ds_optim.sharding.shards import ShardView
from ds_optim.zero.agree import raise_everywhere

CUT = "tensor_model_parallel"
"""Megatron's mark, and AutoTP's, of a parameter that is a shard."""
AUTOTP = "ds_autotp_universal_checkpoint_meta"
"""Where AutoTP leaves on a parameter how it was cut."""
_HAND_MADE = (
    "shards that are marked by hand are seen as plain matrices: cut fused matrices apart into layers of their own, or "
    "let the aux rule have it by matrix_exclude"
)

Members = Sequence[Sequence[Member]]


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is marked as a shard."""
    return bool(getattr(parameter, CUT, False))


def with_shards(members: Members, tensor: Comm | None, engine: Any) -> list[list[Member]]:
    """Members as they lie on this rank, with the shard that each of them is.

    Raises:
        UserError: naming a parameter that cannot be put together again.
    """
    if tensor is None:
        marked = next((m.spec.name for group in members for m in group if is_cut(m.parameter)), None)
        if marked is not None:
            raise UserError(
                f"{marked} is marked as a tensor-parallel shard, and no engine with an mpu steps it: pass mpu= to "
                "deepspeed.initialize, and step through the engine"
            )
        return [list(group) for group in members]
    held = {id(parameter) for parameter in engine.module.parameters()}
    return [[_with_shard(m, tensor, is_live=id(m.parameter) in held) for m in group] for group in members]


def _with_shard(member: Member, tensor: Comm, *, is_live: bool) -> Member:
    name, shape = member.spec.name, full_shape(member.parameter)
    if member.spec.shard is not None:
        return member
    if not is_live:
        raise UserError(
            f"{name} is no longer the model's: AutoTP replaces parameters of a model that was made under "
            "deepspeed.zero.Init. Make the model without it"
        )
    if not is_cut(member.parameter):
        if shape != member.spec.shape:
            raise UserError(f"{name} was {member.spec.shape} and is {shape} now, and nothing says how it was cut")
        return member
    meta = getattr(member.parameter, AUTOTP, None)
    shard = _of_autotp(member, meta, shape) if meta is not None else _of_megatron(member, tensor, shape)
    shard = replace(shard, rank=tensor.rank)
    local = list(shard.whole)
    if len(shard.pieces) == tensor.world_size and shard.dim < len(local):
        local[shard.dim] = shard.sizes[tensor.rank]
    if tuple(local) != shape or len(shard.pieces) != tensor.world_size:
        raise UserError(
            f"{name} is {shape} on tensor-parallel rank {tensor.rank}, and its marks say {tuple(local)}: how it was "
            "cut is not known"
        )
    if 0 in shard.sizes:
        raise UserError(
            f"{name} is cut into unequal parts {list(shard.sizes)} over tensor-parallel ranks, of which some hold "
            "nothing: take a tensor parallel size that divides it (its heads, for queries, keys and values)"
        )
    view = member.view
    if view is not None:
        whole = view if view.shape == shard.whole else replace(view, shape=shard.whole)
        view = ShardView.of_whole(whole, shard, shape)
    return replace(member, spec=replace(member.spec, shape=shape, shard=shard), view=view)


def _of_autotp(member: Member, meta: Mapping[str, Any], shape: tuple[int, ...]) -> Shard:
    whole, dim = meta.get("logical_shape"), meta.get("partition_dim")
    # The shares of ranks: of one matrix, or of each that is fused in it.
    sizes, widths = meta.get("partition_sizes"), meta.get("sub_param_shard_widths")
    each = [list(own) for own in ([sizes] if sizes else widths or [])]
    if whole is None or dim is None or not each:
        reason = (meta.get("conversion") or {}).get("unsupported_reason") or "it does not describe how"
        raise UserError(
            f"{member.spec.name} was cut by AutoTP, and cannot be put together ({reason}): leave its layer out of "
            "tensor_parallel.partition_config"
        )
    if member.spec.shape not in (tuple(whole), shape):
        raise UserError(f"{member.spec.name} was {member.spec.shape} and AutoTP cut {tuple(whole)}")
    begins = [sum(map(sum, each[:number])) for number in range(len(each))]
    pieces = tuple(
        tuple((begin + sum(own[:rank]), own[rank]) for begin, own in zip(begins, each, strict=True))
        for rank in range(len(each[0]))
    )
    return Shard(whole=tuple(whole), dim=int(dim), pieces=pieces)


def _of_megatron(member: Member, tensor: Comm, shape: tuple[int, ...]) -> Shard:
    name, dim = member.spec.name, getattr(member.parameter, "partition_dim", None)
    if not isinstance(dim, int) or not 0 <= dim < len(shape):
        raise UserError(f"{name} is marked as a tensor-parallel shard, and its partition_dim is {dim!r}: write 0 or 1")
    if getattr(member.parameter, "partition_stride", 1) != 1:
        raise UserError(f"{name} has partition_stride {member.parameter.partition_stride}: {_HAND_MADE}")  # type: ignore[attr-defined]
    view = member.view
    if view is not None and (view.split or view.heads or view.batch_dims):
        raise UserError(f"{name} is a tensor-parallel shard that is seen as {view.describe()}: {_HAND_MADE}")
    size, ranks = shape[dim], tensor.world_size
    whole = (*shape[:dim], size * ranks, *shape[dim + 1 :])
    return Shard(whole=whole, dim=dim, pieces=tuple(((rank * size, size),) for rank in range(ranks)))


def agree_on_shards(tensor: Comm, comm: Comm, members: Members, problem: Exception | None) -> None:
    """Before ranks of a tensor-parallel group wait for each other: none has a problem, and all mean the same.

    members: by unit of the layout.

    Raises:
        UserError: on every rank of the group.
    """
    raise_everywhere(problem, tensor)
    names = [[(m.spec.name, m.spec.shard) for m in unit] for unit in members]
    answers = tensor.gather_objects((comm.rank, repr(names)))
    if any(answer != answers[0] for answer in answers):
        different = next(rank for rank, answer in enumerate(answers) if answer != answers[0])
        what = (
            "holds another part of its data-parallel group's partitions"
            if answers[different][0] != answers[0][0]
            else "steps other parameters, or in other sub-groups"
        )
        raise UserError(
            f"tensor-parallel rank {different} {what} than rank 0: use a tensor parallel size that divides the model's "
            "heads and widths, and groups in which the ranks of one have one data-parallel rank"
        )


def everyone(tensor: Comm | None, comm: Comm) -> Comm:
    """Who hears of a problem: under tensor parallelism all ranks, which would wait for each other."""
    return comm if tensor is None else Comm.of_group(dist.group.WORLD)
