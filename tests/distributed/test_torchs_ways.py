"""DistributedDataParallel, and groups that are added before and after an engine has the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import ds_optim
from ds_optim.errors import UserError

from .harness import device, run_ranks
from .models import TinyNet, batch, share
from .small_runs import LION_MUON, Cell, Weights, equal, one_step, quiet, trained_weights


def by_ddp(rank: int, world_size: int) -> tuple[Weights, Weights, list[str]]:
    """Weights by DDP; those of an optimizer that knows no ranks, with the same gradients; names of the groups."""
    model = DistributedDataParallel(TinyNet().to(device()))
    plain = copy.deepcopy(model.module)
    build = ds_optim.LionMuon
    params: Any = LION_MUON["params"]
    optimizer, alone = (build(ds_optim.param_groups(m), **params) for m in (model, plain))
    for step in range(4):
        optimizer.zero_grad()
        x, y = share(*batch(step, 12), rank, world_size)
        model(x.to(device()), y.to(device())).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        alone.step()
    weights = [{n: p.detach().cpu() for n, p in m.named_parameters()} for m in (model.module, plain)]
    return weights[0], weights[1], [group["name"] for group in optimizer.param_groups]


def test_ddp_steps_as_one_process_with_its_gradients() -> None:
    first, second = run_ranks(2, by_ddp)
    for weights, alone, names in (first, second):
        assert equal(weights, alone) == []
        assert names == ["matrix", "aux", "vector"]
    assert equal(first[0], second[0]) == []
    start = TinyNet().state_dict()
    assert all(not torch.equal(start[name], p) for name, p in first[0].items())


def with_added_groups(rank: int, world_size: int) -> list[tuple[Weights, Weights, str]]:
    """Weights where groups were there, and where they were added; what is said of adding one later."""
    import deepspeed

    quiet()
    found = []
    for stage in (2, 3):
        weights = []
        said = ""
        for added in (False, True):
            model = TinyNet().to(device())
            groups = ds_optim.param_groups(model)
            params: Any = LION_MUON["params"]
            optimizer = ds_optim.LionMuon(groups[:1] if added else groups, **params)
            for group in groups[1:] if added else []:
                optimizer.add_param_group(group)
            config = {**Cell(stage=stage).json(world_size), "zero_allow_untested_optimizer": True}
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            try:
                optimizer.add_param_group(ds_optim.param_groups(TinyNet())[0])
            except UserError as refused:
                said = str(refused)
            one_step(engine, 0, rank, world_size)
            weights.append(trained_weights(engine, range(1, 3), rank, world_size))
            engine.destroy()
        found.append((weights[0], weights[1], said))
    return found


@pytest.mark.full
def test_groups_are_added_before_an_engine_has_the_optimizer_and_not_later() -> None:
    for found in run_ranks(2, with_added_groups, timeout=200):
        for there, added, said in found:
            assert equal(there, added) == []
            assert "cannot be added once an engine has the optimizer" in said
