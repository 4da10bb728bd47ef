"""An optimizer that was built and is not the one that steps: one line says so, and nothing is said otherwise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.optimizers import unstepped

LINES = {
    "groups": "ds_optim: LionMuon was built and never stepped; AdamW steps its groups: under offload set",
    "parameters": "ds_optim: LionMuon was built and never stepped; AdamW steps its parameters: transformers' Trainer",
}


@pytest.fixture(autouse=True)
def nobody_waits(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    unstepped._waiting.clear()
    yield
    unstepped._waiting.clear()


def model_with_gradients() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def lion_muon(model: nn.Module) -> ds_optim.LionMuon:
    return ds_optim.LionMuon(ds_optim.param_groups(model))


def test_another_that_steps_its_groups_is_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """As Accelerate does: the optimizer is let go of, its groups live on."""
    optimizer = lion_muon(model_with_gradients())
    other = torch.optim.AdamW(optimizer.param_groups)
    del optimizer
    for _ in range(3):
        other.step()
    (line,) = caplog.messages
    assert line.startswith(LINES["groups"])
    assert '"zero_force_ds_cpu_optimizer": false' in line


def test_another_that_goes_on_stepping_its_parameters_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = model_with_gradients()
    optimizer = lion_muon(model)
    other = torch.optim.AdamW(model.parameters())
    for _ in range(9):
        other.step()
    assert caplog.messages == [], "who begins with another may go on with ours"
    for _ in range(3):
        other.step()
    (line,) = caplog.messages
    assert line.startswith(LINES["parameters"])
    assert optimizer.state == {}


def test_nothing_is_said_of_one_that_steps_or_that_nobody_replaces(caplog: pytest.LogCaptureFixture) -> None:
    model, other = model_with_gradients(), model_with_gradients()
    optimizers = lion_muon(model), torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    again = lion_muon(other)
    again = lion_muon(model)
    for _ in range(12):
        optimizers[2].step()
        again.step()
    optimizers[0].step()
    del again
    unstepped._at_end()
    assert caplog.messages == []


def test_the_hook_goes_when_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    model = model_with_gradients()
    optimizer = lion_muon(model)
    assert len(unstepped._waiting) == len(unstepped._hook) == 1
    optimizer.step()
    assert list(unstepped._waiting) == unstepped._hook == []


def test_short_runs_are_told_at_the_interpreters_end() -> None:
    script = """
import torch, ds_optim
model = torch.nn.Linear(4, 3)
optimizer = ds_optim.LionMuon(ds_optim.param_groups(model))
other = torch.optim.AdamW(model.parameters())
for p in model.parameters():
    p.grad = torch.ones_like(p)
other.step()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    (line,) = (line for line in done.stderr.splitlines() if "ds_optim" in line)
    assert line.startswith(LINES["parameters"])


def test_a_step_of_parameters_that_nobody_trains_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = model_with_gradients()
    optimizer = lion_muon(model)
    for p in model.parameters():
        p.grad = None
    for _ in range(2):
        optimizer.step()
    (line,) = caplog.messages
    assert "LionMuon was stepped and none of its parameters has a gradient: nothing was changed" in line
