"""The compiled passes of the rules that measure first have the bits of the eager path, whatever the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import moments, native, sign_rules
from ds_optim.elementwise.blend import Blend, direction_squares
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.moments import Moments
from ds_optim.elementwise.momentum import Bfloat16, Flat, Int8, scales_numel
from ds_optim.elementwise.native import rules, steps
from ds_optim.elementwise.noise import NoiseKey, uniform_noise
from ds_optim.sharding.sums import rounded_once, square_sum

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler: there is the eager path alone")

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
NU = 0.3  # not a number of fp32: it must be rounded the same way
SIZES = [1, 31, 255, 256, 257, 16_384, 16_385, 140_001]
#: Elements before a tensor in its memory, and behind it: nobody's to write.
MARGIN = 3
EDGES = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1e-42, -1e-45, 3e38, 1.0, NU, -NU, 1e-19, 1e19]
ODD = [float("nan"), float("inf"), float("-inf")]
NOISE = NoiseKey(seed=2**32 - 1, stream=12345, step=2**33 + 7, start=0)


@dataclass(frozen=True)
class Tensors:
    """Weights, momentum, a second buffer that is not negative, and a gradient: (n,) each, in the middle of a memory."""

    memory: tuple[Tensor, ...]

    def __iter__(self) -> Any:
        return (tensor[MARGIN:-MARGIN] for tensor in self.memory)


def tensors(numel: int, values_of: str = "edges") -> Tensors:
    """The same ones at each call: "usual" ones, such with "edges" among them, or with "odd" ones too."""
    draw = torch.Generator().manual_seed(numel)
    made = []
    for number in range(4):
        values = torch.randn(numel + 2 * MARGIN, generator=draw)
        values *= torch.exp2(torch.randint(-40, 20, values.shape, generator=draw) / (10 if values_of == "usual" else 1))
        values.masked_fill_(torch.rand(values.shape, generator=draw) < 0.05, 0.0)
        if values_of != "usual":
            edges = torch.tensor(EDGES + (ODD if values_of == "odd" else []))
            # Each tensor walks the edges at a pace of its own, so that all of them meet.
            places = torch.arange(0, values.numel(), 3)
            values[places] = edges[(places // 3) // len(edges) ** number % len(edges)]
        made.append(values.abs() if number == 2 else values)
    return Tensors(tuple(made))


def agreement(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    return [sign_rules.agreement(m, g, LION, Scratch())]


def cautious(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    sign_rules.cautious_step(p, m, g, blend=LION, lr=1e-3, decay=0.1, scale=1.7, scratch=Scratch())
    return []


def smallest(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    return [sign_rules.smallest_nonzero(m, g, LION, Scratch())]


def count_from(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    same = Blend((0.0, 1.0), (0.5, 0.5))  # the direction is the gradient, nu itself among it
    return [sign_rules.count_from(m, g, blend, NU, Scratch()) for blend in (LION, same)]


def gated(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    sign_rules.gated_step(p, m, g, blend=LION, lr=1e-3, decay=0.0, nu=NU, scratch=Scratch())
    sign_rules.gated_step(p, m, g, blend=Blend((0.0, 1.0), (0.5, 0.5)), lr=1e-3, decay=0.1, nu=NU, scratch=Scratch())
    return []


def raw(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    for blend in (LION, Blend((0.9, 0.1), (0.9, 0.1))):
        sign_rules.raw_step(p, m, g, blend=blend, lr=1e-3, decay=0.1, scratch=Scratch())
    return []


def move(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    return [sign_rules.move_momentum(m, g, LION, Scratch())]


def stochastic(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    sign_rules.stochastic_sign_step(p, m, 0.7, lr=1e-3, decay=0.1, noise=NOISE.at(2**32 - 20), scratch=Scratch())
    return []


def stochastic_element(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    sign_rules.stochastic_element_step(
        p, m, v, g, blend=LION, lr=1e-3, decay=0.1, noise=NOISE.at(77), scratch=Scratch()
    )
    return []


def lasm_element(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    assert isinstance(m, Tensor)
    moments.lasm_element_step(p, m, v, g, betas=(0.9, 0.95), lr=1e-3, decay=0.1, scale=1.5, scratch=Scratch())
    return []


def lamb(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    assert isinstance(m, Tensor)
    found = []
    for step, decay in ((1, 0.1), (3, 0.0), (10_000, 0.1)):  # of the last, the corrections are 1
        which = Moments(betas=(0.9, 0.95), eps=1e-6, step=step)
        found += moments.lamb_measure(p, m, v, g, which, decay, Scratch())
        moments.lamb_step(p, m, v, moments=which, lr=0.01, decay=decay, scratch=Scratch())
    return found


def stable(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    assert isinstance(m, Tensor)
    found = []
    for step, eps in ((1, 1e-8), (3, 0.01), (10_000, 1e-8)):
        which = Moments(betas=(0.9, 0.95), eps=eps, step=step)
        found.append(moments.stable_measure(m, v, g, which, Scratch()))
        moments.stable_step(p, m, v, moments=which, lr=0.01, decay=0.1, scratch=Scratch())
    return found


def sums(p: Flat, m: Flat, v: Tensor, g: Flat) -> list[Tensor]:
    return [square_sum(p), direction_squares(m, g, LION, Scratch()), moments.lasm_difference(m, g, Scratch())]


MOVING = [cautious, gated, raw, move, stochastic, stochastic_element, lasm_element, lamb, stable]
PASSES = [*MOVING, agreement, smallest, count_from, sums]
Pass = Callable[[Flat, Flat, Tensor, Flat], list[Tensor]]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose the path."""
    compiled = steps.library()
    return lambda wanted: monkeypatch.setattr(steps, "library", lambda: None if wanted else compiled)


def bits(tensor: Tensor) -> Tensor:
    """As whole numbers, NaN alike whatever its payload, which the eager path does not keep either."""
    kept = tensor.masked_fill(tensor.isnan(), float("nan"))
    return kept.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def as_decided(numbers: list[Tensor]) -> list[str]:
    """As what is decided from them sees them."""
    return [repr(rounded_once(float(number))) for number in numbers]


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("values", ["usual", "edges", "odd"])
@pytest.mark.parametrize("work", PASSES)
def test_bits_are_those_of_the_eager_path(work: Pass, values: str, numel: int, eager: Callable[[bool], None]) -> None:
    left, said = [], []
    for wanted in (True, False):
        eager(wanted)
        given = tensors(numel, values)
        said.append(as_decided(work(*given)))
        left.append(given.memory)
    assert said[0] == said[1]
    assert [torch.equal(bits(a), bits(b)) for a, b in zip(*left, strict=True)] == [True] * 4
    fresh = tensors(numel, values).memory
    moved = [not torch.equal(bits(a), bits(b)) for a, b in zip(left[1], fresh, strict=True)]
    assert moved[3] is False, "no pass writes the gradient"
    if numel > 31:
        assert any(moved) == (work in MOVING)


@pytest.mark.parametrize("work", PASSES)
def test_threads_change_no_bit(work: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = tensors(300_001, "usual")
        said = work(*given)
        results.append([*map(bits, given.memory), *(bits(number.reshape(1)) for number in said)])
    for others in results[1:]:
        assert [torch.equal(a, b) for a, b in zip(results[0], others, strict=True)] == [True] * len(others)


@pytest.mark.parametrize("work", [agreement, cautious, smallest, count_from, gated, raw, move, stochastic, sums])
def test_narrow_momentum_and_weights_take_the_same_passes(work: Pass, eager: Callable[[bool], None]) -> None:
    """In chunks, each of them in fp32, and rounded back by the same noise."""
    numel, results = 270_001, []
    for wanted in (True, False):
        eager(wanted)
        rounding = NoiseKey(seed=3, stream=5, step=2, start=77)
        _, _, v, g = tensors(numel, "usual")
        codes = torch.randint(-127, 128, (numel,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
        scales = torch.linspace(1e-3, 2, scales_numel(77, numel))
        m = Int8(rounding=rounding, codes=codes, scales=scales)
        p = Bfloat16(rounding=rounding, values=torch.linspace(-1, 1, numel).bfloat16())
        said = as_decided(work(p, m, v, g))
        results.append((said, codes, scales, p.values))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize("start", [0, 17, 2**32 - 100, 2**33 + 5])
@pytest.mark.parametrize("step", [0, 3, 2**40])
def test_noise_is_that_of_the_eager_path(start: int, step: int) -> None:
    """Where the momentum is minus the bound times the noise, no sign is left."""
    key = NoiseKey(seed=2**32 - 1, stream=12345, step=step, start=start)
    noise, p = uniform_noise(torch.empty(1000), key), torch.zeros(1000)
    assert rules.step("stochastic_sign_step", (p, noise * -0.3), (0.3, 0.1, 1.0, key))
    assert not p.any()
    above = noise.nextafter(torch.ones(())) * -0.3
    assert rules.step("stochastic_sign_step", (p, above), (0.3, 0.1, 1.0, key))
    assert p.any()


@pytest.mark.parametrize("n", [0, 1, 31, 32, 100_003])
def test_a_sum_of_squares_is_exact_to_fp64(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(5)) * 1e25
    found = rules.measure("square_sums", (values,))
    assert found is not None
    assert float(found) == pytest.approx(float(values.double().square().sum()), rel=1e-14)


def test_what_the_kernels_do_not_know_is_left_to_the_eager_path() -> None:
    p, m, g = (torch.ones(8) for _ in range(3))
    numbers = LION.weights, 0.1, 1.0
    assert rules.step("raw_step", (p, m, g), numbers)
    for strange in (
        torch.ones(8, dtype=torch.float64),
        torch.ones(16)[::2],
        torch.ones(2, 4),
        torch.ones(8).bfloat16(),
    ):
        assert not rules.step("raw_step", (strange, m, g), numbers)
        assert rules.measure("agreement", (m, strange), [LION.weights]) is None
        assert not rules.suits(p, strange)
    p, m, g = (torch.ones(8, dtype=torch.float64) for _ in range(3))
    sign_rules.raw_step(p, m, g, blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.25, decay=0.0, scratch=Scratch())
    assert p.tolist() == [0.75] * 8
