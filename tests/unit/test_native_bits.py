"""The compiled kernels to the bit: weights and gradients in bfloat16, AdamW, odd values, and any kind of processor."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import WEIGHTS, Bfloat16, Flat, Int8, Stored, read_only, scales_numel
from ds_optim.elementwise.native import library as loading
from ds_optim.elementwise.native import steps as calls
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.elementwise.steps import adamw_step, apply_update, sign_step

LION, SIGNUM = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99)), Blend((0.9, 1 - 0.9), (0.9, 1 - 0.9))
SIZES = [(0, 255), (0, 256), (77, 300), (255, 1), (255, 258), (3, 5000)]
"""(start in the parameter, elements)."""
MOMENTA = ["none", "float32", "bfloat16", "int8"]
STORED = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
"""Dtypes of (weights, gradients)."""
LARGEST_NAN = struct.unpack("f", struct.pack("I", 0x7FFFFFFF))[0]
ODD = [0.0, -0.0, float("nan"), LARGEST_NAN, float("inf"), -float("inf"), 1e-45, -3e-39, 1.2e-38, 3.3e38, -3.4e38, 1.0]

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler: there is the eager path alone")

Choose = Callable[[bool], None]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Choose the path."""
    compiled = loading.library()
    return lambda wanted: monkeypatch.setattr(calls, "library", lambda: None if wanted else compiled)


@pytest.fixture(params=["generic", "-mno-avx512f"])
def other_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels compiled for a processor with less than this one has."""
    less = () if request.param == "generic" else ("-march=native", request.param)
    flags = [flag for flag in loading._FLAGS if flag != "-march=native"]
    monkeypatch.setattr(loading, "_FLAGS", (*flags, *less))
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    loading.library.cache_clear()
    if less and loading.library() is None:
        pytest.skip("no such option here")
    yield
    loading.library.cache_clear()


def gauss(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-9, 9, (n,), generator=generator))
    return values.masked_fill_(torch.rand(n, generator=generator) < 0.05, 0.0)


def odd(n: int, seed: int) -> Tensor:
    """One value in forty is one that arithmetic ends at, in some blocks none."""
    generator = torch.Generator().manual_seed(seed)
    values, which = gauss(n, seed), torch.randint(len(ODD) * 40, (n,), generator=generator)
    which[n // 2 : n // 2 + 600] = len(ODD)
    return torch.where(which < len(ODD), torch.tensor(ODD)[which.clamp(max=len(ODD) - 1)], values)


def rounding(start: int, step: int) -> NoiseKey:
    return NoiseKey(seed=3, stream=2**32 - 5, step=step, start=start)


def momentum(kind: str, start: int, numel: int) -> Flat | None:
    if kind == "none":
        return None
    if kind == "float32":
        return torch.zeros(numel)
    if kind == "bfloat16":
        return Bfloat16(rounding=rounding(start, 2**33 + 1), values=torch.zeros(numel, dtype=torch.bfloat16))
    scales = torch.zeros(scales_numel(start, numel))
    return Int8(rounding=rounding(start, 2**33 + 1), codes=torch.zeros(numel, dtype=torch.int8), scales=scales)


def stored(values: Tensor, dtype: str, start: int, *, writable: bool) -> Flat:
    if dtype == "float32":
        return values
    return Bfloat16(rounding=rounding(start, WEIGHTS + 5), values=values.bfloat16(), writable=writable)


def parts(*held: Flat | None) -> Iterator[Tensor]:
    for tensor in held:
        if isinstance(tensor, Tensor):
            yield tensor
        elif tensor is not None:
            yield tensor.data
            if isinstance(tensor, Int8):
                yield tensor.scales


def some_steps(
    kind: str, dtypes: tuple[str, str], start: int, numel: int, values: Callable[[int, int], Tensor] = gauss
) -> list[Tensor]:
    """All that two rounds of every kernel leave behind."""
    m, p = momentum(kind, start, numel), stored(values(numel, 1), dtypes[0], start, writable=True)
    mean, square = values(numel, 2), values(numel, 3).abs()
    scratch, left = Scratch(), []
    for number in range(2):
        g = stored(values(numel, 10 + number), dtypes[1], start, writable=False)
        sign_step(p, m, g, blend=LION, lr=1e-3, decay=0.1, scale=1.7, scratch=scratch)
        left += [tensor.clone() for tensor in parts(p, m)]
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(numel, dtype=dtype)
            blend_into(out, m, g, SIGNUM, scratch)
            apply_update(p, out, lr=0.01, decay=0.0, scale=3.3, scratch=scratch)
            left.append(out)
        apply_update(p, torch.full((numel,), -3, dtype=torch.int8), lr=0.01, decay=0.2, scratch=scratch)
        apply_update(p, g, lr=0.01, decay=0.2, scratch=scratch)
        if isinstance(m, Stored):
            looked = torch.empty(numel)
            blend_into(looked, read_only(m), g, SIGNUM, scratch)
            left.append(looked)
        rates = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}
        adamw_step(p, mean, square, g, **rates, step=number + 1, scratch=scratch)  # type: ignore[arg-type]
    return [*left, mean, square, *parts(p, m)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Every bit, but for those of NaN, of which a processor makes one and a library another."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    sound = ~torch.isnan(a)
    return torch.equal(sound, ~torch.isnan(b)) and torch.equal(a.view(whole)[sound], b.view(whole)[sound])


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) >= 9
    assert [same_bits(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(got)
    assert any(tensor.any() for tensor in got)


@pytest.mark.parametrize("dtypes", STORED, ids=str)
@pytest.mark.parametrize("kind", MOMENTA)
def test_weights_and_gradients_may_be_narrow(kind: str, dtypes: tuple[str, str], eager: Choose) -> None:
    for start, numel in SIZES:
        eager(True)
        expected = some_steps(kind, dtypes, start, numel)
        eager(False)
        assert_same_bits(some_steps(kind, dtypes, start, numel), expected)


@pytest.mark.parametrize("dtypes", STORED[:2], ids=str)
@pytest.mark.parametrize("kind", MOMENTA)
def test_odd_values(kind: str, dtypes: tuple[str, str], eager: Choose) -> None:
    eager(True)
    expected = some_steps(kind, dtypes, 300, 4000, odd)
    eager(False)
    assert_same_bits(some_steps(kind, dtypes, 300, 4000, odd), expected)
    assert any(torch.isnan(tensor).any() for tensor in expected)


@pytest.mark.full
@pytest.mark.usefixtures("other_processor")
def test_any_processor_has_the_same_bits(eager: Choose) -> None:
    for kind, dtypes in product(MOMENTA, STORED[:2]):
        eager(True)
        expected = some_steps(kind, dtypes, 255, 1100, odd)
        eager(False)
        assert_same_bits(some_steps(kind, dtypes, 255, 1100, odd), expected)


@pytest.mark.parametrize("kind", ["none", "float32", "int8"])
def test_threads_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        left.append(some_steps(kind, STORED[1], 77, 150_001))
    assert_same_bits(left[1], left[0])


@pytest.mark.parametrize(("lr", "decay"), [(-1e-3, 0.0), (0.0, 0.1)])
def test_a_zero_keeps_its_sign(lr: float, decay: float, eager: Choose) -> None:
    left = []
    for wanted in (True, False):
        eager(wanted)
        p, m = torch.tensor([0.0, -0.0] * 256), momentum("bfloat16", 0, 512)
        sign_step(p, m, torch.zeros(512), blend=LION, lr=lr, decay=decay)
        left.append(p)
    assert same_bits(*left)


def test_slices_that_are_cut_differently_are_left_to_the_eager_path() -> None:
    p = Bfloat16(rounding=rounding(0, 1), values=torch.zeros(8, dtype=torch.bfloat16))
    assert not native.sign_step(p, momentum("int8", 1, 8), torch.ones(8), (0, 1, 0, 0), 0.1, 1.0)
    assert not native.apply_update(p, momentum("int8", 0, 8), 0.1, 1.0)  # type: ignore[arg-type]
    assert not p.values.any()
