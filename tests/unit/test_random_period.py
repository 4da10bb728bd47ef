"""LionMuon's period_mode "random": each step orthogonalizes with probability 1 / P, all matrices at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ds_optim.optimizers.lion_muon import is_spectral
from tests.stepping import SmallModel, build, random_grads, take_steps, weights_of


@pytest.mark.full
@pytest.mark.parametrize(("period", "seed"), [(2, 0), (5, 1), (20, 2**32 - 1)])
def test_random_phases_have_their_rate(period: int, seed: int) -> None:
    """Over 4000 steps, the first and second half alike."""
    drawn = [is_spectral(step, period, "random", seed) for step in range(4000)]
    for part in (drawn, drawn[:2000], drawn[2000:]):
        deviation = (len(part) * (1 / period) * (1 - 1 / period)) ** 0.5
        assert abs(sum(part) - len(part) / period) < 5 * deviation


def test_random_phases_depend_on_the_seed_and_fixed_ones_do_not() -> None:
    def phases(mode: str, seed: int) -> list[bool]:
        return [is_spectral(step, 3, mode, seed) for step in range(300)]

    assert phases("random", 0) == phases("random", 0) != phases("random", 1)
    assert phases("fixed", 0) == phases("fixed", 1) == [step % 3 == 0 for step in range(300)]
    assert phases("random", 0) != phases("fixed", 0)


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_ends_of_the_period(mode: str) -> None:
    assert all(is_spectral(step, 1, mode, 5) for step in range(1000))
    assert not any(is_spectral(step, float("inf"), mode, 5) for step in range(1000))


def test_matrices_are_orthogonalized_at_the_drawn_steps_all_at_once() -> None:
    """A sign step moves all elements by the same; an orthogonalized one does not."""
    model = SmallModel(0.0)
    hyper: dict[str, Any] = {"period": 3, "period_mode": "random", "seed": 4, "polar": {"dtype": "float32"}}
    optimizer = build("LionMuon", model, lr=2.0**-6, sign_lr_ratio=8, weight_decay=0.0, **hyper)
    spectral = []
    for entry in random_grads(20):
        before = weights_of(model)
        take_steps(model, optimizer, [entry])
        sizes = {name: np.abs(weights_of(model)[name] - before[name]) for name in ("tall.weight", "square.weight")}
        (alike,) = {bool(np.ptp(size) < 1e-6) for size in sizes.values()}
        spectral.append(not alike)
    assert spectral == [is_spectral(step, 3, "random", 4) for step in range(20)]
    assert True in spectral
    assert False in spectral
