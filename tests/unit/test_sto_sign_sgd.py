"""StoSignSGD: noise that is a function of what it is for, a step whose mean is m / B, and bounds that never fall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ds_optim
from ds_optim.elementwise import chunks as chunking
from ds_optim.elementwise import noise as noise_module
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.noise import NoiseKey, stream_of, uniform, uniform_noise
from ds_optim.elementwise.sign_rules import stochastic_element_step, stochastic_sign_step
from tests import philox
from tests.stepping import SmallModel, build, random_grads, take_steps, trained, weights_of

LR = 2.0**-6
WORD = 2**32
KEYS = [(0, 0), (7, stream_of("attn.q_proj.weight")), (WORD - 1, WORD - 1)]
STEPS = [0, 1, WORD - 1, WORD, 3 * WORD + 5, 2**60 + 11]
STARTS = [0, 1, 4_099, WORD - 3, WORD, 5 * WORD + 2]


def noise(start: int, count: int, *, seed: int = 3, stream: int = 99, step: int = 4) -> Tensor:
    return uniform_noise(torch.empty(count), NoiseKey(seed=seed, stream=stream, step=step, start=start))


def expected(start: int, count: int, *, seed: int, stream: int, step: int) -> NDArray[np.float32]:
    """By the test's own generator, in fp64, rounded once."""
    element = [(start + number) for number in range(count)]
    counter = [[step % WORD, step // WORD, e % WORD, e // WORD] for e in element]
    words = philox.philox4x32(np.array(counter, dtype=np.uint32), (seed, stream))[:, 0]
    return ((words.astype(np.float64) + 0.5) / 2.0**31 - 1.0).astype(np.float32)


# ------------------------------------------------------------------------------------------------- the noise


@pytest.mark.parametrize(("seed", "stream"), KEYS)
@pytest.mark.parametrize("step", STEPS)
def test_noise_is_philox_to_the_bit(seed: int, stream: int, step: int) -> None:
    for start in STARTS:
        ours = noise(start, 37, seed=seed, stream=stream, step=step).numpy()
        np.testing.assert_array_equal(ours, expected(start, 37, seed=seed, stream=stream, step=step))
    whole = philox.uniform_noise(seed, stream, step, 5000).astype(np.float32)
    np.testing.assert_array_equal(noise(0, 5000, seed=seed, stream=stream, step=step).numpy(), whole)


@pytest.mark.parametrize("step", [0, WORD + 2])
def test_a_shared_draw_is_the_first_words(step: int) -> None:
    word = philox.philox4x32(np.array([[step % WORD, step // WORD, 0, 0]], dtype=np.uint32), (5, 6))[0, 0]
    assert uniform(seed=5, stream=6, step=step) == (float(word) + 0.5) / WORD


@pytest.mark.parametrize("size", [1, 7, 64])
def test_noise_does_not_depend_on_chunks_or_offsets(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise(WORD - 100, 300)
    monkeypatch.setattr(noise_module, "_CPU_CHUNK", size)
    assert torch.equal(noise(WORD - 100, 300), whole)
    for cut in (1, 99, 100, 101, 299):
        assert torch.equal(torch.cat([noise(WORD - 100, cut), noise(WORD - 100 + cut, 300 - cut)]), whole)


def test_noise_lies_in_the_interval_and_fills_it() -> None:
    """The largest word gives 1 once rounded to fp32; the ends are reached and never passed."""
    values = noise(0, 200_000).double()
    assert -1 <= float(values.min()) < -0.9999
    assert 0.9999 < float(values.max()) <= 1
    counts = torch.histc(values, bins=20, min=-1, max=1)
    # 20 bins of 10,000: chi^2 of 19 degrees, mean 19, deviation 6.2.
    assert float(((counts - 10_000).square() / 10_000).sum()) < 19 + 5 * 6.2


@pytest.mark.parametrize("other", [{"seed": 4}, {"stream": 100}, {"step": 5}, {"step": 4 + WORD}, {"start": WORD + 10}])
def test_noise_of_another_key_or_counter_is_independent(other: dict[str, int]) -> None:
    """Correlations of 20,000 pairs have deviation 1/141; one of 1 would be the same noise."""
    start = other.pop("start", 10)
    one, two = noise(10, 20_000).double(), noise(start, 20_000, **other).double()
    assert abs(float((one * two).mean())) * 3 < 5 / 20_000**0.5


# -------------------------------------------------------------------------------------------------- the step


def step_of(m: Tensor, bound: Tensor | float, start: int, p: Tensor | None = None) -> Tensor:
    p = torch.zeros_like(m) if p is None else p.clone()
    common: dict[str, Any] = {"lr": LR, "decay": 0.25, "noise": NoiseKey(seed=1, stream=2, step=3, start=start)}
    if isinstance(bound, float):
        stochastic_sign_step(p, m, bound, scratch=Scratch(), **common)
        return p
    still = Blend((1.0, 0.0), (1.0, 0.0))
    stochastic_element_step(p, m.clone(), bound.clone(), torch.zeros_like(m), blend=still, scratch=Scratch(), **common)
    return p


@pytest.mark.parametrize("element", [False, True])
def test_a_step_is_the_formula_wherever_it_is_cut(element: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, p = torch.randn(333, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 333)
    bound: Tensor | float = m.abs() * 1.5 if element else float(m.abs().max())
    n = expected(40, 333, seed=1, stream=2, step=3)
    limit = np.float32(bound) if isinstance(bound, float) else bound.numpy()
    want = p.numpy() * np.float32(1 - LR * 0.25) - np.float32(LR) * np.sign(n * limit + m.numpy())
    assert np.array_equal(step_of(m, bound, 40, p).numpy(), want)
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: 50)
    assert np.array_equal(step_of(m, bound, 40, p).numpy(), want)
    head = step_of(m[:111], bound[:111] if isinstance(bound, Tensor) else bound, 40, p[:111])
    tail = step_of(m[111:], bound[111:] if isinstance(bound, Tensor) else bound, 151, p[111:])
    assert np.array_equal(torch.cat([head, tail]).numpy(), want)


class Parameter(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))


def first_steps(grads: list[Tensor], **hyper: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """(Weights before - weights after) / LR of every step of a vector from 0, and its state."""
    model = Parameter(grads[0].numel())
    optimizer = ds_optim.StoSignSGD(ds_optim.param_groups(model), lr=LR, **hyper)
    signs = []
    for grad in grads:
        before = model.weight.detach().clone()
        model.weight.grad = grad.clone()
        optimizer.step()
        signs.append((before - model.weight.detach()) / LR)
    return signs, optimizer.state[model.weight]


@pytest.mark.parametrize("bound", ["tensor", "element"])
def test_the_mean_of_the_update_is_m_over_b(bound: str) -> None:
    """A first gradient sets the bounds, a second one of up to .9 of them is the momentum: over 400 seeds."""
    count, seeds = 8000, 400
    draw = torch.Generator().manual_seed(5)
    largest = torch.exp(torch.randn(count, generator=draw)) if bound == "element" else torch.full((count,), 2.0)
    target = 1.8 * torch.rand(count, generator=draw) - 0.9
    total = torch.zeros(count, dtype=torch.float64)
    for seed in range(seeds):
        (_, second), _ = first_steps([largest, largest * target], beta=0.0, bound=bound, seed=seed)
        assert bool((second.abs() == 1).all())
        total += second
    mean = target.double()
    z = (total / seeds - mean) / ((1 - mean.square()) / seeds).sqrt()
    assert float(z.abs().max()) < 5
    assert 0.9 < float(z.square().mean()) < 1.1


@pytest.mark.parametrize("bound", ["tensor", "element"])
def test_where_the_bound_is_0_nothing_moves(bound: str) -> None:
    zero = torch.zeros(64)
    (step,), state = first_steps([zero], bound=bound)
    assert not step.any()
    assert not state["exp_avg"].any()
    some = zero.clone()
    some[::2] = 1.0
    (step,), _ = first_steps([some], bound=bound)
    assert bool(step[::2].all())
    # By elements each has its own bound; by tensor a zero among others is thrown about by their noise.
    assert bool(step[1::2].any()) == (bound == "tensor")


@pytest.mark.parametrize("bound", ["tensor", "element"])
def test_bounds_are_the_largest_momentum_ever(bound: str) -> None:
    draw = torch.Generator().manual_seed(2)
    grads = [size * torch.randn(50, generator=draw) for size in (1.0, 5.0, 0.1, 0.0, 1e-30, 2.0)]
    m: np.ndarray = np.zeros(50, dtype=np.float32)
    most, previous = m, m
    for taken in range(1, len(grads) + 1):
        _, state = first_steps(grads[:taken], bound=bound, beta=0.5)
        m = np.float32(0.5) * m + np.float32(0.5) * grads[taken - 1].numpy()
        most = np.maximum(most, np.abs(m))
        kept = (
            state["exp_avg_sq"].numpy() if bound == "element" else np.full(50, state["scalars"]["weight"], np.float32)
        )
        assert (kept >= previous).all()
        np.testing.assert_array_equal(kept, most if bound == "element" else most.max())
        previous = kept


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(500))
        self.two = nn.Parameter(torch.zeros(500))


def test_parameters_seeds_and_steps_have_their_own_noise() -> None:
    grad = torch.cat([torch.tensor([10.0]), 0.01 * torch.ones(499)])  # signs that noise decides
    model = Twins()
    optimizer = build("StoSignSGD", model, lr=LR)
    take_steps(model, optimizer, [{"one": grad, "two": grad}])
    runs = [first_steps([grad, grad], seed=seed, beta=0.0)[0] for seed in (0, 1)]
    pairs = {"names": (model.one, model.two), "seeds": (runs[0][0], runs[1][0]), "steps": (runs[0][0], runs[0][1])}
    for kind, (a, b) in pairs.items():
        assert 0.35 < float((a != b).double().mean()) < 0.65, kind
    assert torch.equal(runs[0][0], first_steps([grad], seed=0, beta=0.0)[0][0])


@pytest.mark.parametrize("bound", ["tensor", "element"])
def test_chunks_change_no_bit(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = random_grads(4)
    whole = trained("StoSignSGD", grads, bound=bound, seed=11)
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: 50)
    monkeypatch.setattr(noise_module, "_CPU_CHUNK", 13)
    for name, values in trained("StoSignSGD", grads, bound=bound, seed=11).items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.parametrize("bound", ["tensor", "element"])
def test_the_order_of_parameters_changes_no_bit(bound: str) -> None:
    """Names decide, and named parameters bring theirs along."""
    grads, model = random_grads(4), SmallModel()
    named = list(reversed(list(model.named_parameters())))
    take_steps(model, ds_optim.StoSignSGD(named, bound=bound, seed=11), grads)
    for name, values in trained("StoSignSGD", grads, bound=bound, seed=11).items():
        np.testing.assert_array_equal(weights_of(model)[name], values)
