"""The compiled kernels have the bits of the eager path, at any length, offset and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import Bfloat16, Int8, Stored, read_only, scales_numel
from ds_optim.elementwise.native import library as loading
from ds_optim.elementwise.native import steps as calls
from ds_optim.elementwise.native import tables
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


MANY = [(0, 1), (77, 300), (255, 2), (0, 255), (300, 200_003), (512, 256)]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "float32", "bfloat16", "int8"])
def test_slices_of_a_table_get_the_bits_of_calls_of_their_own(
    kind: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one partition with gaps between them, each with a scale, a stream and a place beside it of its own."""
    rows, place, at, block = [], 3, 5, 0
    for number, (start, numel) in enumerate(MANY):
        rows.append(tables.Row(numel, place, at, block, stream=number + 2**31, start=start, scale=1 + number / 7))
        place, at, block = place + numel + number % 2, at + numel + 1, block + scales_numel(start, numel)
    key = NoiseKey(seed=3, stream=0, step=2**33 + 1, start=0)

    def whole(values: Tensor) -> Tensor | Bfloat16:
        return Bfloat16(rounding=key, values=values) if values.dtype == torch.bfloat16 else values

    def left(together: bool) -> list[Tensor]:
        p, g, beside = gauss(place, 1).to(dtype), gauss(place, 2).to(dtype), gauss(at, 3)
        v, out = torch.zeros(place), torch.zeros(at, dtype=torch.bfloat16)
        m = momentum(kind, 0, place)
        if isinstance(m, Stored):
            m = replace(m, rounding=key)
        if isinstance(m, Int8):
            m = replace(m, scales=torch.zeros(block))
        numbers = (0.9, 1 - 0.9, 0.99, 1 - 0.99, 1e-8, 0.5, 1e-3, 0.9)
        adam = torch.zeros(place)
        if together:
            table = tables.Table(rows)
            assert tables.sign_steps(table, whole(p), m, beside, LION.weights, 1e-3, 0.9)
            assert tables.blends(table, out, m, whole(g), SIGNUM.weights)
            assert tables.apply_updates(table, whole(p), out, 0.01, 0.9)
            assert tables.adamw_steps(table, whole(p), adam, v, beside, numbers)
            return [p, g, v, adam, out, *tensors(m)]
        for row in rows:
            own, near = slice(row.place, row.place + row.numel), slice(row.at, row.at + row.numel)
            noise = replace(key, stream=row.stream, start=row.start)
            weights, gradient = (as_slice(whole(one), own, noise) for one in (p, g))
            kept = None if m is None else as_slice(m, own, noise, row.block)
            assert native.sign_step(weights, kept, beside[near], LION.weights, 1e-3, 0.9)
            assert native.blend_into(out[near], kept, gradient, SIGNUM.weights)
            assert native.apply_update(weights, out[near], 0.01 * row.scale, 0.9)
            assert native.adamw_step(weights, adam[own], v[own], beside[near], numbers)
        return [p, g, v, adam, out, *tensors(m)]

    expected = left(together=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert [torch.equal(a, b) for a, b in zip(left(together=True), expected, strict=True)] == [True] * len(expected)


def as_slice(whole: Tensor | Stored, own: slice, noise: NoiseKey, block: int = 0) -> Tensor | Stored:
    if isinstance(whole, Int8):
        scales = whole.scales[block : block + scales_numel(noise.start, own.stop - own.start)]
        return replace(whole, rounding=noise, codes=whole.codes[own], scales=scales)
    return replace(whole, rounding=noise, values=whole.values[own]) if isinstance(whole, Bfloat16) else whole[own]


def test_a_table_steps_nothing_outside_of_its_tensors() -> None:
    table = tables.Table([tables.Row(8, place=4, at=0, block=0, stream=0, start=0)])
    p, m, g = torch.zeros(12), torch.zeros(12), torch.ones(8)
    assert not tables.sign_steps(table, p[:11], m, g, LION.weights, 0.1, 1.0)
    assert not tables.sign_steps(table, p, m[:11], g, LION.weights, 0.1, 1.0)
    assert not tables.sign_steps(table, p, m, g[:7], LION.weights, 0.1, 1.0)
    assert tables.sign_steps(table, p, m, g, LION.weights, 0.1, 1.0)
    assert torch.equal(p, torch.cat([torch.zeros(4), torch.full((8,), -0.1)]))
