"""QK-clip at every stage: rows of queries and keys, wherever they lie, by the largest logit that any rank has seen."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim.errors import UserError
from tests.tiers import cells

from .harness import run_ranks
from .training import ParityNet, Recorder, Run, Weights, layout_of, random_gradients, start_engine, take_step

PAIRS: dict[str, Any] = {
    "first": ("wide.weight", "tall.weight"),
    "second": ("square.weight", "back.weight"),
    "third": "fused.weight",
}
BIASES = {"tall.weight": "tall.bias"}
HEADS, KEY_HEADS, TAU, ALPHA = 4, 2, 10.0, 0.3
STEPS = 3
STAGES = (0, 1, 2, 3)


def logits(step: int, rank: int) -> dict[str, Tensor]:
    """(batch, heads, queries, keys); of the second layer rank 0 alone has seen any, and nobody at the last step."""
    noise = torch.Generator().manual_seed(10 * step + rank)
    found = {name: 8 * torch.randn(2, HEADS, 3, 3, generator=noise) for name in ("first", "third")}
    if rank == 0 and step < STEPS - 1:
        found["second"] = 5 * torch.randn(HEADS, generator=noise).abs() + 5
    return found


def train(rank: int, world_size: int, stages: tuple[int, ...]) -> dict[tuple[int, bool], Weights]:
    """The weights of each stage, without and with the clip; on rank 0."""
    found = {}
    for stage in stages:
        for clipped in (False, True):
            run = Run(type="Lion", params={"lr": 1e-2, "weight_decay": 0.0}, stage=stage, steps=STEPS)
            engine, _ = start_engine(run, world_size)
            options: dict[str, Any] = {"key_heads": KEY_HEADS, "tau": TAU, "alpha": ALPHA}
            clip = ds_optim.QKClip(engine, PAIRS, HEADS, **options) if clipped else None
            recorder = Recorder(engine.basic_optimizer, layout_of(run, world_size), rank, random_gradients)
            for step in range(STEPS):
                for layer, values in logits(step, rank).items() if clip is not None else ():
                    clip.observe(layer, values)
                take_step(engine, run, rank, world_size, step)
            found[stage, clipped] = recorder.collect().weights
            engine.destroy()
    return found


@cache
def trained(world_size: int) -> dict[tuple[int, bool], Weights]:
    return run_ranks(world_size, train, STAGES, timeout=300)[0]


def expected(world_size: int) -> dict[str, np.ndarray]:
    """Lion without decay in fp64 (its signs do not know the weights), and g after each step."""
    weights = {name: p.detach().double().numpy().copy() for name, p in ParityNet().named_parameters()}
    momentum = {name: np.zeros_like(value) for name, value in weights.items()}
    for step in range(STEPS):
        for name, gradient in random_gradients(step).items():
            g = gradient.double().numpy()
            weights[name] -= 1e-2 * np.sign(0.9 * momentum[name] + 0.1 * g)
            momentum[name] = 0.99 * momentum[name] + 0.01 * g
        for layer, pair in PAIRS.items():
            seen = [own[layer] for own in (logits(step, rank) for rank in range(world_size)) if layer in own]
            largest = [v.numpy() if v.dim() == 1 else v.amax(dim=(0, 2, 3)).numpy() for v in seen]
            g = np.minimum(1.0, TAU / np.max([np.full(HEADS, 1e-9), *largest], axis=0))
            shared = g.reshape(KEY_HEADS, -1).min(axis=1)
            queries, keys = g**ALPHA, shared ** (1 - ALPHA)
            fused = np.concatenate([queries, keys, np.ones(KEY_HEADS)])
            for name, factor in (
                {pair: fused}.items() if isinstance(pair, str) else zip(pair, (queries, keys), strict=True)
            ):
                for part in (name, *([BIASES[name]] if name in BIASES else [])):
                    value = weights[part]
                    weights[part] = (value.reshape(len(factor), -1) * factor[:, None]).reshape(value.shape)
    return weights


@pytest.mark.parametrize("world_size", cells([2], [3]))
@pytest.mark.parametrize("stage", STAGES)
def test_rows_of_heads_shrink_and_nothing_else(stage: int, world_size: int) -> None:
    plain, clipped = trained(world_size)[stage, False], trained(world_size)[stage, True]
    theirs = expected(world_size)
    names = {"wide.weight", "tall.weight", "square.weight", "back.weight", "fused.weight", *BIASES.values()}
    for name, values in clipped.items():
        if name in names:
            np.testing.assert_allclose(values.double().numpy(), theirs[name], rtol=2e-6, atol=1e-8)
            assert not torch.equal(values, plain[name])
        else:
            assert torch.equal(values, plain[name])


def test_mistakes_are_one_line() -> None:
    model = ParityNet()
    optimizer = ds_optim.Lion(ds_optim.param_groups(model))
    for pairs, heads, options, line in (
        ({"a": ("nowhere.weight", "tall.weight")}, 4, {}, "'nowhere.weight' is no matrix that the optimizer steps"),
        ({"a": ("wide.weight", "tall.weight")}, 5, {}, "'wide.weight' has 24 rows for its heads"),
        ({"a": ("wide.weight", "tall.weight")}, 4, {"key_heads": 3}, "4 heads do not share 3 keys in equal groups"),
        ({"a": ("wide.weight", "tall.weight")}, 4, {"tau": 0.0}, "tau is 0.0: write a finite number above 0"),
    ):
        with pytest.raises(UserError, match=line):
            ds_optim.QKClip(optimizer, pairs, heads, **options)
    clip = ds_optim.QKClip(optimizer, {"a": ("wide.weight", "tall.weight")}, 4)
    with pytest.raises(UserError, match="there is no layer 'b'; there are a"):
        clip.observe("b", torch.zeros(4))
    with pytest.raises(UserError, match="a has logits of 3 heads, not 4"):
        clip.observe("a", torch.zeros(2, 3, 5, 5))
