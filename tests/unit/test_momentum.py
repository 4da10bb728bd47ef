"""Momentum in 16 and 8 bits: what is stored, without a bias, and the same wherever a slice is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim.elementwise import chunks as chunking
from ds_optim.elementwise import momentum
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.momentum import (
    BLOCK,
    LEVELS,
    Bfloat16,
    Int8,
    Stored,
    encode,
    read_only,
    scales_numel,
)
from ds_optim.elementwise.noise import NoiseKey, rounding_bits
from ds_optim.elementwise.steps import sign_step
from ds_optim.errors import UserError
from tests.cases import NARROW
from tests.philox import philox4x32
from tests.stepping import SmallModel, build, random_grads, take_steps, weights_of

KINDS = ("bfloat16", "int8")
LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
ONE_BUFFER = sorted(NARROW)


def gauss(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * torch.exp2(torch.randint(-6, 6, (n,), generator=generator))


def store(kind: str, numel: int, *, seed: int = 0, step: int = 0, start: int = 0) -> Stored:
    """Momentum of zeros."""
    rounding = NoiseKey(seed=seed, stream=7, step=step, start=start)
    if kind == "bfloat16":
        return Bfloat16(rounding=rounding, values=torch.zeros(numel, dtype=torch.bfloat16))
    scales = torch.zeros(scales_numel(start, numel))
    return Int8(rounding=rounding, codes=torch.zeros(numel, dtype=torch.int8), scales=scales)


def loaded(m: Stored) -> Tensor:
    out = torch.empty(m.shape)
    m.load(0, out)
    return out


def stored(kind: str, values: Tensor, **place: int) -> Tensor:
    """What becomes of values that are stored and read again."""
    m = store(kind, values.numel(), **place)
    m.store(0, values.clone())
    return loaded(m)


def levels(scale: float) -> np.ndarray:
    """What an int8 block of this scale can hold, in fp64."""
    t = np.arange(-LEVELS, LEVELS + 1) / LEVELS
    return scale * t * np.abs(t)


def neighbours(kind: str, value: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that can be stored on either side of ``value``; ``largest``: of its block."""
    if kind == "bfloat16":
        bits = np.abs(value).astype(np.float32).view(np.uint32)
        low, high = (x.astype(np.uint32).view(np.float32) for x in (bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000))
        return np.sign(value) * low, np.sign(value) * high
    k = np.floor(np.sqrt(np.abs(value) / largest) * LEVELS)
    return tuple(np.sign(value) * largest * ((k + i) / LEVELS) ** 2 for i in (0, 1))  # type: ignore[return-value]


def test_rounding_bits_are_philox() -> None:
    for start, step, seed in ((0, 0, 0), (13, 5, 3), (8 * 2**33 + 1, 2**34 + 1, 2**31)):
        bits = rounding_bits(torch.empty(1000), NoiseKey(seed=seed, stream=77, step=step, start=start))
        element = np.arange(start, start + 1000, dtype=np.uint64)
        counter = np.stack([np.full(1000, step & 0xFFFFFFFF), np.full(1000, step >> 32)], axis=1)
        which = element // 256 * 32 + element % 32
        counter = np.concatenate([counter, np.stack([which & 0xFFFFFFFF, which >> 32], axis=1)], axis=1)
        words = philox4x32(counter.astype(np.uint32), (seed, 77 ^ 0xFFFFFFFF))
        half = (element % 256 // 32).astype(int)
        expected = words[np.arange(1000), half // 2] >> (16 * (half % 2)).astype(np.uint32) & 0xFFFF
        assert np.array_equal(bits.numpy(), expected.astype(np.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_becomes_one_of_its_neighbours(kind: str) -> None:
    values = gauss(3 * BLOCK)
    largest = values.abs().view(-1, BLOCK).amax(dim=1).repeat_interleave(BLOCK).double().numpy()
    got = stored(kind, values).double().numpy()
    low, high = neighbours(kind, values.double().numpy(), largest)
    slack = 1e-6 * np.maximum(np.abs(high), 1e-30)
    assert np.all((np.abs(got - low) <= slack) | (np.abs(got - high) <= slack))
    assert 0.2 < np.mean(np.abs(got - low) <= slack) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_has_no_bias(kind: str) -> None:
    """Over 800 steps the mean is the value: |z| < 5 for each element, mean z^2 within 0.9-1.1."""
    draws, values = 800, gauss(8 * BLOCK)
    largest = values.abs().view(-1, BLOCK).amax(dim=1).repeat_interleave(BLOCK).double().numpy()
    exact = values.double().numpy()
    low, high = neighbours(kind, exact, largest)
    chance = (exact - low) / (high - low)
    # Where one of the two all but never comes, the mean of 800 draws is not normal.
    usual = (chance > 0.03) & (chance < 0.97)
    assert usual.mean() > 0.8
    mean = sum(stored(kind, values, step=step).double().numpy() for step in range(draws)) / draws
    with np.errstate(invalid="ignore", divide="ignore"):
        z = ((mean - exact) / (np.abs(high - low) * np.sqrt(chance * (1 - chance) / draws)))[usual]
    assert np.abs(z).max() < 5
    assert 0.9 < np.mean(z**2) < 1.1


def test_over_all_draws_the_mean_is_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 2^16 draws, each once: bf16 has no bias, int8 at most half a draw, 2^-17 of what lies between codes."""
    draws = torch.arange(1 << 16, dtype=torch.int32)
    monkeypatch.setattr(momentum, "rounding_bits", lambda like, key: draws)
    out = Bfloat16(
        values=torch.empty(len(draws), dtype=torch.bfloat16), rounding=NoiseKey(seed=0, stream=7, step=0, start=0)
    )
    for value in gauss(20).tolist():
        out.store(0, torch.full((len(draws),), value))
        assert out.values.double().mean().item() == value
    for x in (1e-3, 0.7, 1.0, 2.5, 899.999, 5000.25, 16128.4):
        codes = encode(torch.full((1, len(draws)), x / LEVELS**2), torch.ones(1, 1), draws.view(1, -1)).double()
        k = np.floor(np.sqrt(x))
        assert set(codes.unique().tolist()) <= {k, k + 1}
        assert abs((codes - k).mean().item() * (2 * k + 1) - (x - k * k)) <= (2 * k + 1) * 2.0**-17 + x * 2.0**-22


@pytest.mark.parametrize("kind", KINDS)
def test_small_increments_are_not_lost(kind: str) -> None:
    """0.9999 m + 0.0001 g with g = 0.9 m: each step moves m by a 10^5th, far below a step of either dtype."""
    steps, numel = 400, 4 * BLOCK
    m = torch.ones(numel)
    held: list[Stored] = [store(kind, numel)]
    held[0].store(0, m.clone())
    out = torch.empty(numel)
    g = torch.full((numel,), 0.5)
    g[::BLOCK] = 1.0  # the largest of each int8 block stands still, so that the others' steps stay what they are
    for step in range(steps):
        current = held[0]
        place = NoiseKey(seed=0, stream=7, step=step, start=0)
        current = type(current)(**{**vars(current), "rounding": place})
        blend_into(out, current, g, Blend((0.0, 1.0), (0.999, 0.001)))
    expected = 0.5 + 0.5 * 0.999**steps
    others = torch.ones(numel, dtype=torch.bool)
    others[::BLOCK] = False
    mean = float(loaded(held[0])[others].mean())
    assert mean == pytest.approx(expected, abs=0.01)
    nearest = m.clone().bfloat16()
    for _ in range(steps):
        nearest = (nearest.float() * 0.999 + 0.0005).bfloat16()
    assert float(nearest.float().mean()) > expected + 0.1, "rounding to nearest would have done as well"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [256, 1024])
def test_bits_do_not_depend_on_the_slice(kind: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between blocks, in chunks of any size: the same values as in one piece. bfloat16: cut anywhere."""
    values, g, p = gauss(2000, 1), gauss(2000, 2), gauss(2000, 3)
    whole, weights = store(kind, 2000, start=512), p.clone()
    whole.store(0, values.clone())
    sign_step(weights, whole, g, blend=LION, lr=1e-3, decay=0.1)
    monkeypatch.setattr(chunking, "chunk_elements", lambda device: 512)
    places = [0, cut if kind == "int8" else cut + 3, 2000]
    for begin, end in pairwise(places):
        part, own = store(kind, end - begin, start=512 + begin), p[begin:end].clone()
        part.store(0, values[begin:end].clone())
        sign_step(own, part, g[begin:end], blend=LION, lr=1e-3, decay=0.1)
        assert torch.equal(own, weights[begin:end])
        assert torch.equal(part.data, whole.data[begin:end])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_only_reads_stores_nothing(kind: str) -> None:
    m = store(kind, 600)
    m.store(0, gauss(600))
    before = m.data.clone()
    out = torch.empty(600)
    blend_into(out, read_only(m), gauss(600, 2), LION)
    assert torch.equal(m.data, before)
    blend_into(out, m, gauss(600, 2), LION)
    assert not torch.equal(m.data, before)


def test_extremes_stay_finite() -> None:
    for kind in KINDS:
        values = torch.tensor([3.4e38, -3.4e38, 1e-30, -1e-38, 0.0, 1e-45] * 100)
        assert torch.isfinite(stored(kind, values)).all()
        assert not stored(kind, torch.zeros(10)).any()
    tiny = torch.full((300,), 1e-30)
    assert stored("int8", tiny).mean() == pytest.approx(1e-30, rel=1e-3)


def test_no_code_beyond_127() -> None:
    values = torch.full((1, BLOCK), 1.0)
    codes = encode(values, torch.ones(1, 1), torch.full((1, BLOCK), 0, dtype=torch.int32))
    assert codes.unique().tolist() == [127]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_BUFFER)
def test_every_rule_trains_near_its_fp32_run(name: str, kind: str) -> None:
    """Ten steps: apart by less than a third of the way that fp32 momentum went; 8 bits are seen in every rule."""
    grads = random_grads(10)
    start = weights_of(SmallModel(0.001))
    rates: dict[str, Any] = {"lr": 0.01}
    runs = {}
    for dtype in ("float32", kind):
        model = SmallModel(0.001)
        optimizer = build(name, model, **rates, momentum_dtype=dtype)
        take_steps(model, optimizer, grads)
        runs[dtype] = weights_of(model)
        key = "exp_avg_codes" if dtype == "int8" else "exp_avg"
        dtypes = {state[key].dtype for state in optimizer.state.values()}
        assert dtypes == {{"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype]}
    apart = sum(float(((runs[kind][n] - w) ** 2).sum()) for n, w in runs["float32"].items()) ** 0.5
    moved = sum(float(((w - start[n]) ** 2).sum()) for n, w in runs["float32"].items()) ** 0.5
    assert apart < moved / 3
    assert apart > 0 or kind == "bfloat16"


@pytest.mark.parametrize(
    "optimizer",
    [("Lamb", {}), ("StableAdamW", {}), ("LASM", {"variance": "element"}), ("StoSignSGD", {"bound": "element"})],
)
def test_two_buffers_are_refused(optimizer: tuple[str, dict[str, Any]]) -> None:
    name, hyper = optimizer
    with pytest.raises(UserError, match='write momentum_dtype "float32"'):
        build(name, SmallModel(), momentum_dtype="int8", **hyper)
    with pytest.raises(UserError, match="bfloat16"):
        ds_optim.Lion(ds_optim.param_groups(SmallModel()), momentum_dtype="bfloat")


def test_adamw_for_the_rest_keeps_fp32() -> None:
    model = SmallModel()
    optimizer = build("Muon", model, aux="adamw", momentum_dtype="int8")
    take_steps(model, optimizer, random_grads(1))
    kept = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert kept["square.weight"]["exp_avg_codes"].dtype == torch.int8
    assert "exp_avg" not in kept["square.weight"]
    assert {kept[name]["exp_avg"].dtype for name in ("embed.weight", "gain")} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_keeps_dtype_and_bits(kind: str) -> None:
    model = SmallModel()
    optimizer = build("LionMuon", model, momentum_dtype=kind)
    take_steps(model, optimizer, random_grads(2))
    again = build("LionMuon", model, momentum_dtype=kind)
    again.load_state_dict(optimizer.state_dict())
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            restored = again.state[parameter][key]
            if torch.is_tensor(value):
                assert restored.dtype == value.dtype
                assert torch.equal(restored, value)
    other = build("LionMuon", model)
    with pytest.raises(UserError, match="momentum_dtype"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state, "what is refused must not be half loaded"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_BUFFER)
def test_every_group_rounds_by_the_optimizers_seed(name: str, kind: str) -> None:
    """After one step, whose momentum is the same for all seeds: the seeds of a study share no noise."""

    def stored_momenta(**seed: int) -> list[Tensor]:
        model = SmallModel()
        optimizer = build(name, model, momentum_dtype=kind, **seed)
        take_steps(model, optimizer, random_grads(1))
        assert {group["seed"] for group in optimizer.param_groups} == {seed.get("seed", 0)}
        groups = [group["params"] for group in optimizer.param_groups]
        key = "exp_avg_codes" if kind == "int8" else "exp_avg"
        return [torch.cat([optimizer.state[p][key].flatten() for p in params]) for params in groups]

    default, zero, one, again = stored_momenta(), *(stored_momenta(seed=seed) for seed in (0, 1, 1))
    for kept, same, other, twin in zip(default, zero, one, again, strict=True):
        assert torch.equal(kept, same)
        assert torch.equal(other, twin)
        assert not torch.equal(kept, other)


def test_a_load_brings_the_seed_back_and_a_checkpoint_of_old_has_0() -> None:
    first, model = build("Lion", SmallModel(), seed=3), SmallModel()
    second = build("Lion", model, momentum_dtype="int8", seed=5)
    saved = build("Lion", SmallModel(), momentum_dtype="int8", seed=3).state_dict()
    second.load_state_dict(saved)
    assert {group["seed"] for group in first.param_groups + second.param_groups} == {3}
    for group in saved["param_groups"]:
        del group["seed"]
    second.load_state_dict(saved)
    take_steps(model, second, random_grads(1))
    twin = SmallModel()
    optimizer = build("Lion", twin, momentum_dtype="int8", seed=0)
    take_steps(twin, optimizer, random_grads(1))
    gain, other = second.state[model.gain]["exp_avg_codes"], optimizer.state[twin.gain]["exp_avg_codes"]
    assert torch.equal(gain, other)
