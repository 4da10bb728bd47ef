"""Decay only where the update does not turn away from zero: the option of all rules, done around their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.elementwise import chunks, fused, native
from ds_optim.errors import UserError

SIZE = 3001
NARROW = [{"momentum_dtype": dtype} for dtype in ("float32", "bfloat16", "int8")]


def stepped(name: str, start: torch.Tensor, steps: int = 3, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and whole momentum, after known gradients."""
    model = nn.Linear(start.shape[1], start.shape[0], bias=False)
    model.weight.data.copy_(start)
    optimizer = getattr(ds_optim, name)(ds_optim.param_groups(model), **options)
    for step in range(steps):
        model.weight.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    momentum = ds_optim.full_momentum(optimizer, model.weight)
    assert momentum is not None
    return model.weight.detach().clone(), momentum


def weights() -> torch.Tensor:
    return torch.randn(7, SIZE // 7 + 1, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("options", NARROW)
@pytest.mark.parametrize("name", ["Lion", "LASM", "Muon", "LionMuon"])
def test_in_chunks_the_rule_steps_to_the_same_bits(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decay too small for fp32 leaves the rule's own step, which the chunks must not be seen in."""
    expected = stepped(name, weights(), weight_decay=0.0, **options)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 512)
    monkeypatch.setattr(chunks, "CPU_GRAIN", 1)
    for found, wanted in zip(
        stepped(name, weights(), weight_decay=1e-30, cautious_decay=True, **options), expected, strict=True
    ):
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_half_of_the_elements_decay_and_those_that_grow_do_not() -> None:
    start, lr, decay = weights(), 1e-3, 2.0
    plain, _ = stepped("Lion", start, 1, lr=lr, weight_decay=0.0)
    cautious, _ = stepped("Lion", start, 1, lr=lr, weight_decay=decay, cautious_decay=True)
    shrank = (start - plain) * start >= 0
    assert 0.4 < shrank.float().mean() < 0.6
    assert torch.equal(cautious[~shrank], plain[~shrank])
    torch.testing.assert_close(cautious[shrank], (plain - lr * decay * start)[shrank], rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", ["Lamb", "MuonH"])
def test_a_rule_whose_decay_is_no_decay_beside_its_update_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} has no decay beside its update: take cautious_decay out"):
        stepped(name, weights(), cautious_decay=True)


def test_bf16_masters_are_refused_at_start() -> None:
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "bf16": bf16}
    optimizer = {"type": "Lion", "params": {"cautious_decay": True}}
    with pytest.raises(UserError, match="cautious_decay is for fp32 master weights"):
        ds_optim.from_config(nn.Linear(4, 4), {**config, "optimizer": optimizer})
    ds_optim.from_config(nn.Linear(4, 4), {**config, "optimizer": {**optimizer, "params": {}}})


def test_what_is_no_switch_is_refused() -> None:
    with pytest.raises(UserError, match="cautious_decay is 'yes': write true or false"):
        stepped("Lion", weights(), cautious_decay="yes")


@pytest.mark.parametrize("name", ["Lion", "StoSignSGD", "Muon"])
def test_where_a_kernel_cannot_the_decay_is_done_around_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose compiler fails in the midst of a step."""
    options = {"weight_decay": 0.5, "cautious_decay": True}
    expected = stepped(name, weights(), **options)
    monkeypatch.setattr(native.steps, "library", lambda: None)
    monkeypatch.setattr(fused, "ready", lambda device: True)
    monkeypatch.setattr(fused, "_take", lambda *_: False)
    for found, wanted in zip(stepped(name, weights(), **options), expected, strict=True):
        assert torch.equal(found, wanted)


def test_one_step_of_weights_decays_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that says its slices go together, and steps them twice, is told so: the second would decay them again."""
    monkeypatch.setattr(fused, "_take", lambda *_: True)
    with fused.cautiously(0.1, lambda: None):
        fused.step("sign_step", (), ())
        with pytest.raises(RuntimeError, match="takes one step of their weights"):
            fused.step("sign_step", (), ())
