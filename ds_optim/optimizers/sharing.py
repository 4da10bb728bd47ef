"""Matrices that ranks of a node share, as ``exchange.share`` asks for them: what may be, and the ranks' groups."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist

from ds_optim.errors import UserError
from ds_optim.optimizers.local import Local
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM
from ds_optim.sharding.binding import Binding
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shares import SharedPlan, shared_by
from ds_optim.sharding.sharing import SharedExchange, teams_of


def share(binding: Binding, plans: Mapping[int, ExchangePlan], wanted: bool | str | int) -> dict[int, ExchangePlan]:
    """The plans with what ranks share in them, alike on all ranks; collective.

    Raises:
        UserError: they cannot here; on every rank.
    """
    comm = binding.comm
    everyone = comm.group is None or dist.get_process_group_ranks(comm.group) == list(range(dist.get_world_size()))
    if not everyone or binding.tensor is not None or binding.experts:
        raise UserError(
            "exchange.share is for runs in which all ranks hold parts of every parameter: take it out beside tensor or "
            "pipeline parallelism, experts of their own ranks, and ZeRO's smaller groups"
        )
    if binding.in_files or any(tensors[0].device != binding.device for tensors in binding.tensors):
        raise UserError("exchange.share is for partitions on the accelerator: take it or offload_optimizer out")
    on_node = set(comm.gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    ranks = on_node.pop() if len(on_node) == 1 else 1
    return {number: shared_by(plan, wanted, ranks) for number, plan in plans.items()}


def check_shared(local: Local, exchange: Exchange, *, whole: bool = False) -> None:
    """Refuse, before any write, what cannot go on with parts of matrices. whole: the rule wants whole ones.

    Raises:
        UserError: on every rank.
    """
    if not exchange.plan.shared:
        return
    if whole:
        raise UserError("this rule wants whole matrices at their owners: take exchange.share out")
    if CODES_OF_MOMENTUM in local.states[0]:  # a block of which may lie across the border of two ranks' rows
        raise UserError('exchange.share is for momentum of whole values: take momentum_dtype "bfloat16", or it out')


def exchanges_of(binding: Binding, plans: Mapping[int, ExchangePlan]) -> dict[int, Exchange]:
    """By unit; collective where ranks share matrices."""
    shared = [plan for plan in plans.values() if isinstance(plan, SharedPlan)]
    teams = teams_of(binding.comm, shared) if shared else {}
    found: dict[int, Exchange] = {}
    for number, plan in plans.items():
        home = binding.tensors[number][0].device
        if isinstance(plan, SharedPlan):
            found[number] = SharedExchange(plan, binding.comm, binding.device, home, teams)
        else:
            found[number] = Exchange(plan, binding.comm_of(number), binding.device, binding.tensor, home)
    return found
