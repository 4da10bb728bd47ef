"""The matrix of tests stands on these models: every parameter moves, batches are the same everywhere."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.models import VOCABULARY, TinyNet, batch, share


@pytest.mark.parametrize("tied", [False, True])
def test_every_row_of_every_parameter_gets_a_gradient_above_rounding(tied: bool) -> None:
    model = TinyNet(tied=tied)
    exact = TinyNet(tied=tied).double()
    assert len(list(model.parameters())) == (9 if tied else 10)
    for step in range(3):
        model.zero_grad()
        exact.zero_grad()
        model(*batch(step, 8)).backward()
        exact(*batch(step, 8)).backward()
        for name, parameter in model.named_parameters():
            gradient = exact.get_parameter(name).grad
            assert parameter.grad is not None, name
            assert gradient is not None, name
            # row by row, so that no row is mere rounding of zero
            error, size = (t.reshape(len(t), -1).norm(dim=1) for t in (parameter.grad - gradient, gradient))
            assert bool((error < 1e-3 * size).all()), name


def test_an_unused_layer_has_no_gradient() -> None:
    model = TinyNet()
    model(*batch(0, 8), unused=True).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["square.weight"]


def test_weights_and_batches_follow_their_seeds() -> None:
    first, again, other = TinyNet(), TinyNet(), TinyNet(seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))
    assert torch.equal(batch(3, 12)[0], batch(3, 12)[0])
    assert not torch.equal(batch(3, 12)[0], batch(4, 12)[0])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (3, 1), (4, 3)])
def test_shares_make_up_the_batch(world_size: int, accumulation: int) -> None:
    tokens, targets = batch(0, 12)
    assert set(tokens.flatten().tolist()) == set(range(VOCABULARY))
    losses = [
        TinyNet()(*share(tokens, targets, rank, world_size, micro, accumulation))
        for rank in range(world_size)
        for micro in range(accumulation)
    ]
    torch.testing.assert_close(torch.stack(losses).mean(), TinyNet()(tokens, targets))
    with pytest.raises(ValueError, match="do not divide"):
        share(tokens, targets, 0, 5)
