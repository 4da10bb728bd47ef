"""ZeRO++: secondary shards change no bit; rounded weights and gradients are stepped as the unsharded optimizer does.

Its kernels are CUDA's alone: :class:`tests.distributed.zeropp.Rounding` stands in their place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import ds_optim

from .harness import run_ranks
from .losses import PARAMS
from .sequences import new_model
from .training import Weights
from .zeropp import frozen_shard, train

HPZ = {"zero_hpz_partition_size": 2}
STEPS = 6
CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    "hpZ": (2, HPZ),
    "hpZ of 2 in 4": (4, HPZ),
    "qwZ": (2, {"zero_quantized_weights": True}),
    "qgZ": (2, {"zero_quantized_gradients": True}),
    "all three": (2, {**HPZ, "zero_quantized_weights": True, "zero_quantized_gradients": True}),
}


@cache
def trained(world_size: int, **zero: Any) -> tuple[list[float], Weights, list[Weights]]:
    """LOCAL_SIZE: devices of a node, by which qgZ counts nodes."""
    return run_ranks(world_size, train, zero, "LionMuon", STEPS, env={"LOCAL_SIZE": "1"})[0]


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS)
def test_the_unsharded_optimizer_takes_the_same_steps(cell: str) -> None:
    world_size, zero = CELLS[cell]
    losses, weights, gradients = trained(world_size, **zero)
    model = new_model()
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), **PARAMS["LionMuon"])
    for entry in gradients:
        for name, p in model.named_parameters():
            p.grad = entry[name].clone()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if not torch.equal(p.detach(), weights[n])] == []
    assert losses[0] - losses[-1] > 0.5


@pytest.mark.full
@pytest.mark.parametrize("cell", ["hpZ", "hpZ of 2 in 4"])
def test_secondary_shards_change_no_bit(cell: str) -> None:
    world_size, zero = CELLS[cell]
    one, other = trained(world_size, **zero), trained(world_size)
    assert one[0] == other[0]
    assert [n for n in one[1] if not torch.equal(one[1][n], other[1][n])] == []


@pytest.mark.full
@pytest.mark.parametrize("cell", ["qwZ", "qgZ"])
def test_rounding_is_there(cell: str) -> None:
    """Else the tests above would show nothing: the gradients of the first step differ from those without it."""
    rounded, plain = trained(CELLS[cell][0], **CELLS[cell][1])[2], trained(2)[2]
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = rounded[0][name], plain[0][name]
    assert not torch.equal(one, other)
    assert float((one - other).norm() / other.norm()) < 0.2


@pytest.mark.full
def test_frozen_weights_are_lost_in_int8_shards_with_adamw() -> None:
    """Why zero_quantized_nontrainable_weights is refused: values are copied to whole numbers, without a scale."""
    for shard, before in run_ranks(2, frozen_shard):
        assert shard.dtype == torch.int8
        assert 0 < float(before.abs().max()) < 1
        assert not shard.any()
