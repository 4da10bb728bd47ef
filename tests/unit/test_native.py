"""The compiled kernels have the bits of the eager path, at any length, offset and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import Bfloat16, Int8, Stored, read_only, scales_numel
from ds_optim.elementwise.native import library as loading
from ds_optim.elementwise.native import steps as calls
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.elementwise.steps import apply_update, sign_step

LION, SIGNUM = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99)), Blend((0.9, 1 - 0.9), (0.9, 1 - 0.9))
SIZES = [(0, 1), (0, 255), (0, 256), (77, 300), (255, 1), (255, 2), (256, 4096), (300, 200_003)]
"""(start in the parameter, elements)."""

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C compiler: there is the eager path alone")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose the path."""
    compiled = loading.library()
    return lambda wanted: monkeypatch.setattr(calls, "library", lambda: None if wanted else compiled)


def gauss(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-9, 9, (n,), generator=generator))
    return values.masked_fill_(torch.rand(n, generator=generator) < 0.05, 0.0)


def momentum(kind: str, start: int, numel: int) -> Tensor | Stored | None:
    rounding = NoiseKey(seed=3, stream=2**32 - 5, step=2**33 + 1, start=start)
    if kind == "none":
        return None
    if kind == "float32":
        return torch.zeros(numel)
    if kind == "bfloat16":
        return Bfloat16(rounding=rounding, values=torch.zeros(numel, dtype=torch.bfloat16))
    scales = torch.zeros(scales_numel(start, numel))
    return Int8(rounding=rounding, codes=torch.zeros(numel, dtype=torch.int8), scales=scales)


def tensors(m: Tensor | Stored | None) -> Iterator[Tensor]:
    if isinstance(m, Tensor):
        yield m
    elif isinstance(m, Int8):
        yield from (m.codes, m.scales)
    elif m is not None:
        yield m.data


def some_steps(kind: str, start: int, numel: int) -> list[Tensor]:
    """All that three rounds of every kernel leave behind."""
    m, p, scratch = momentum(kind, start, numel), gauss(numel, 1), Scratch()
    left = [p]
    for number in range(3):
        g = gauss(numel, 10 + number)
        sign_step(p, m, g, blend=LION, lr=1e-3, decay=0.1, scale=1.7, scratch=scratch)
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.empty(numel, dtype=dtype)
            blend_into(out, m, g, SIGNUM, scratch)
            apply_update(p, out, lr=0.01, decay=0.0, scale=3.3, scratch=scratch)
            left.append(out)
        apply_update(p, left[-1].sign().to(torch.int8), lr=0.01, decay=0.2, scratch=scratch)
        if isinstance(m, Stored):
            looked = torch.empty(numel)
            blend_into(looked, read_only(m), g, SIGNUM, scratch)
            left.append(looked)
    return [*left, *tensors(m)]


@pytest.mark.parametrize("kind", ["none", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("start", "numel"), SIZES)
def test_bits_are_those_of_the_eager_path(kind: str, start: int, numel: int, eager: Callable[[bool], None]) -> None:
    eager(True)
    expected = some_steps(kind, start, numel)
    eager(False)
    got = some_steps(kind, start, numel)
    assert len(got) == len(expected) > 6
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(got)
    assert any(t.any() for t in got)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_threads_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = some_steps(kind, 77, 300_001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    four = some_steps(kind, 77, 300_001)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_what_the_kernels_do_not_know_is_left_to_the_eager_path() -> None:
    p, g = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert not native.sign_step(p, None, g, (0, 1, 0, 0), 0.1, 1.0)
    assert not native.sign_step(torch.zeros(16)[::2], None, torch.ones(8), (0, 1, 0, 0), 0.1, 1.0)
    assert not native.blend_into(torch.zeros(8, dtype=torch.float16), None, torch.ones(8), (0, 1, 0, 0))
    out = torch.ones(8)
    assert not native.blend_into(out, None, out, (0, 1, 0, 0)), "in place is not for arrays that must not overlap"
    sign_step(p, None, g, blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.1, decay=0.0)
    assert p.tolist() == [-0.1] * 8
