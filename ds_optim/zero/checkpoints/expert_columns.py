"""The columns of a checkpoint whose ranks have different experts: what its files, and the new ones, say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ds_optim.errors import UserError
from ds_optim.optimizers.experts import SHARED_BY
from ds_optim.sharding.layout import Layout
from ds_optim.zero.checkpoints.columns import WRONG, Column, experts_over, is_of_experts
from ds_optim.zero.checkpoints.experts import Experts, read_experts
from ds_optim.zero.checkpoints.folder import Files
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.safe import load
from ds_optim.zero.checkpoints.stage0 import Names, read_stage0
from ds_optim.zero.checkpoints.states import Saved
from ds_optim.zero.refused import is_true


def columns_of_experts(files: Files, model: Mapping[str, Any], count: int, ranks: int) -> list[Column]:
    config = model.get("ds_config")
    consecutive = isinstance(config, Mapping) and is_true(config.get("use_data_before_expert_parallelism"))
    if ranks % count:
        raise UserError(f"{files.folder} has {ranks} ranks and experts over {count}: {WRONG}")
    return [Column(number=n, count=count, experts=True, consecutive=consecutive) for n in range(count)]


def read_columns_at_stage0(
    files: Files, column: Column, model: Mapping[str, Any], names: Names | None, state: bool
) -> Iterator[Saved]:
    """Of each column, where experts have optimizer files: each is the whole optimizer of a rank that has them."""
    if not files.expert_optimizers:
        yield replace(read_stage0(files, model, names, state=state), column=column)
        return
    count, ranks = len(files.expert_optimizers), int(model["dp_world_size"])
    pairs = zip(columns_of_experts(files, model, count, ranks), files.expert_optimizers, strict=True)
    for own, path in pairs:
        experts = read_experts(files.experts, own)
        weights = {**model["module"], **{name: experts.weights(name) for name in experts.names}}
        optimizer = load(path).get("optimizer")
        found = read_stage0(files, {**model, "module": weights, "optimizer": optimizer}, names, state=state)
        if experts_over(found.groups, files.folder) != count:
            raise UserError(f"{path} is of {count} ranks that have other experts, and its groups are not: {WRONG}")
        yield of_experts(found, own, experts, files)


def of_experts(found: Saved, column: Column, experts: Experts, files: Files) -> Saved:
    """With its column's experts, and a description that says nothing of who shares them.

    Raises:
        UserError: other ranks shared them than the column has, or not all of them were trained.
    """
    shared = tuple(column.ranks(len(files.optimizers)))
    named = {
        spec.name
        for specs, group in zip(found.params, found.groups, strict=True)
        if is_of_experts(group)
        for spec in specs
    }
    frozen = [name for name in experts.names if name not in named]
    if frozen:
        raise UserError(f"{files.folder}: {frozen[0]} is frozen: experts are cut anew where all of them are trained")
    description = found.description
    if description is not None:
        groups = description["groups"]
        for group in groups:
            if SHARED_BY in group and tuple(group[SHARED_BY]) != shared:
                raise UserError(f"{files.folder}: experts are shared by {group[SHARED_BY]} and not {shared}: {WRONG}")
        bare = [{key: value for key, value in group.items() if key != SHARED_BY} for group in groups]
        description = {**description, "groups": bare}
    return replace(found, column=column, experts=experts, description=description)


def partition_groups(portable: Portable, layout: Layout, ranks: int, rank: int) -> list[dict[str, Any]]:
    """Who shares each sub-group, as DeepSpeed 0.19 notes it where there are experts."""
    found = []
    for number, unit in enumerate(layout.units):
        hyper, sharing = portable.groups[unit.group].hyper, portable.sharing(unit, ranks)
        experts = is_of_experts(hyper)
        found.append(
            {
                "sub_group": number,
                "partition_count": len(sharing),
                "partition_rank": sharing.index(rank),
                "partition_ranks": sharing,
                "families": ["autoep_expert" if experts else "replicated"],
                "group_names": [hyper["name"] if experts else "replicated"],
            }
        )
    return found
