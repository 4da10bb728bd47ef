"""What owners make of a polar factor before it goes back: rows of one size, steps on a sphere."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim

FP32: dict[str, Any] = {"polar": {"dtype": "float32"}}


class Views(nn.Module):
    """A matrix of each kind of view: whole, fused of unlike parts, turned, by heads, stacked."""

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__()
        for name, shape in {
            "whole": (6, 9),
            "fused": (12, 5),
            "turned": (5, 8),
            "heads": (8, 5),
            "experts": (3, 4, 7),
        }.items():
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            self.register_parameter(name, nn.Parameter(scale * noise))


VIEWS = [
    {"match": "fused", "split": [8, 2, 2]},
    {"match": "turned", "transpose": True},
    {"match": "heads", "heads": 2},
    {"match": "experts", "batch_dims": 1},
]


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every matrix of every view, by parameter and number, in fp64."""
    found = {}
    for members in ds_optim.Lion(ds_optim.param_groups(model, views=VIEWS)).members:
        for member in members:
            assert member.view is not None
            blocks = member.view.unpack(member.parameter.detach().double().flatten())
            for number, matrix in enumerate(m for block in blocks for m in block):
                found[f"{member.spec.name} {number}"] = matrix.clone()
    return found


def stepped(name: str, model: nn.Module, count: int, **hyper: Any) -> None:
    optimizer = getattr(ds_optim, name)(ds_optim.param_groups(model, views=VIEWS), **FP32, **hyper)
    for step in range(count):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()


def test_muon_h_keeps_the_norm_of_each_matrix_of_each_view() -> None:
    model = Views()
    before = matrices(model)
    stepped("MuonH", model, 40, lr=0.3)
    after = matrices(model)
    assert len(before) == 1 + 3 + 1 + 2 + 3
    for name, matrix in before.items():
        assert float(after[name].norm() / matrix.norm()) == pytest.approx(1, abs=1e-6), name
        cosine = float((after[name] * matrix).sum() / matrix.norm() ** 2)
        assert cosine < 0.9, f"{name} has hardly turned"


def test_muon_h_stands_still_at_rate_0_and_says_what_zeros_do(caplog: pytest.LogCaptureFixture) -> None:
    model = Views()
    before = matrices(model)
    stepped("MuonH", model, 2, lr=0.0)
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(model).items())
    model = Views(0.0)
    with caplog.at_level(logging.WARNING):
        stepped("MuonH", model, 1)
    assert "a matrix of zeros has no norm to keep" in caplog.text
    assert not any(matrix.any() for matrix in matrices(model).values())


def test_steps_of_nor_muon_have_one_root_mean_square() -> None:
    model = Views()
    for _ in range(3):
        before = matrices(model)
        stepped("NorMuon", model, 1, lr=0.5, weight_decay=0.0)
        for name, matrix in matrices(model).items():
            change = (matrix - before[name]).square().mean().sqrt()
            assert float(change) == pytest.approx(0.2 * 0.5, rel=1e-5), name


def test_rows_of_nor_muon_grow_alike_where_one_is_always_small() -> None:
    """With a second moment of its own, a row whose factor is small steps as far as the others."""
    model = nn.Linear(8, 4, bias=False)
    start = model.weight.detach().clone()
    optimizer = ds_optim.NorMuon(ds_optim.param_groups(model), lr=0.1, weight_decay=0.0, **FP32)
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    noise[3] = noise[0] + 0.01 * noise[3]  # nearly the first row: its polar factor is no different, and by itself small
    for _ in range(3):
        model.weight.grad = noise.clone()
        optimizer.step()
    sizes = (model.weight.detach() - start).norm(dim=1)
    assert float(sizes.max() / sizes.min()) < 1.01
    assert list(optimizer.state[model.weight]["row_squares"]) == ["weight"]
    assert optimizer.state[model.weight]["row_squares"]["weight"].shape == (4,)


def test_another_view_of_saved_rows_is_refused() -> None:
    model = Views()
    stepped_once = ds_optim.NorMuon(ds_optim.param_groups(model, views=VIEWS), **FP32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    stepped_once.step()
    other = ds_optim.NorMuon(ds_optim.param_groups(model, views=[v for v in VIEWS if v["match"] != "turned"]), **FP32)
    other.load_state_dict(stepped_once.state_dict())
    with pytest.raises(ds_optim.UserError, match="8 rows of turned here, and as it is seen now there are 5"):
        other.step()
