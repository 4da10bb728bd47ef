"""An optimizer goes when its last reference does: its state is not kept until the next garbage collection."""

from __future__ import annotations

import gc
import weakref

import torch

from tests.stepping import SmallModel, build, random_grads, take_steps


def test_a_stepped_optimizer_is_freed_at_once() -> None:
    model = SmallModel()
    build("Lion", model)  # torch keeps the frames of a process's first optimizer (by an import that fails within)
    optimizer = build("LionMuon", model)
    take_steps(model, optimizer, random_grads(2))
    held = weakref.ref(optimizer)
    momentum = weakref.ref(optimizer.state[model.square.weight]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert held() is None
        assert momentum() is None
    finally:
        gc.enable()
    assert isinstance(model.square.weight, torch.nn.Parameter)
