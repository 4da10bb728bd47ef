"""A parameter that is several matrices, and what a step does where nothing is sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers import ZeroOptimizer
from tests.stepping import SmallModel, build, random_grads, take_steps, weights_of

FP32 = {"dtype": "float32"}
FUSED = [{"match": "weight", "split": [4, 12]}]


def gauss(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_matrices_of_unlike_shape_in_one_parameter_step_as_they_would_alone() -> None:
    """Each at the scale of its own shape, as in a grouped-query QKV."""
    fused, parts = nn.Linear(8, 16, bias=False), nn.ModuleList([nn.Linear(8, n, bias=False) for n in (4, 12)])
    weights, gradient = gauss(16, 8, 1), gauss(16, 8, 2)
    fused.weight.data.copy_(weights)
    fused.weight.grad = gradient.clone()
    for part, w, g in zip(parts, weights.split([4, 12]), gradient.split([4, 12]), strict=True):
        part.weight.data.copy_(w)
        part.weight.grad = g.clone()
    ds_optim.Muonlight(ds_optim.param_groups(fused, views=FUSED), lr=0.1, polar=FP32).step()
    ds_optim.Muonlight(ds_optim.param_groups(parts), lr=0.1, polar=FP32).step()
    torch.testing.assert_close(fused.weight, torch.cat([part.weight for part in parts]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("factor", "is_open"), [(0.99, True), (1.01, False)])
def test_the_gate_of_several_matrices_asks_for_the_root_mean_square_of_their_norms(
    factor: float, is_open: bool
) -> None:
    model = nn.Linear(8, 16, bias=False)
    model.weight.grad = gauss(16, 8, 3)
    tau = factor * float(model.weight.grad.norm() / 2**0.5)
    groups = ds_optim.param_groups(model, views=FUSED)
    optimizer = ds_optim.MiMuon(groups, beta=1.0, tau=tau, polar=FP32, diagnostics=True)
    optimizer.step()
    assert optimizer.diagnostics["matrix/open gates"] == is_open


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["Lion", "LionMuon"])
def test_a_gradient_that_is_not_finite_moves_nothing(name: str, value: float) -> None:
    model = SmallModel()
    optimizer = build(name, model)
    assert isinstance(optimizer, ZeroOptimizer)
    entries = random_grads(2)
    take_steps(model, optimizer, entries[:1])
    before = weights_of(model)
    entries[1]["gain"][3] = value
    take_steps(model, optimizer, entries[1:])
    assert optimizer.skipped_steps == 1
    assert all((before[key] == now).all() for key, now in weights_of(model).items())
