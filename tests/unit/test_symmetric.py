"""Symmetric products in strips: the same product, half of it mirrored, and the iterations that are made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.matrix import dispatch, newton_schulz, symmetric
from ds_optim.matrix.polar import DTYPES, PolarSpec, polar
from ds_optim.matrix.schedules import schedule

CPU = torch.device("cpu")
SIDES = (1, 31, 33, 64, 100, 130)
SCHEDULES = ("keller", "you", "polar_express")


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma: Tensor, long: int) -> Tensor:
    """A wide matrix with singular values ``sigma``."""
    u, _ = torch.linalg.qr(gauss(len(sigma), len(sigma), seed=1).double())
    v, _ = torch.linalg.qr(gauss(long, len(sigma), seed=2).double())
    return ((u * sigma.double()) @ v.mT).float()


def cut_into(strips: int, **options: str) -> PolarSpec:
    return PolarSpec(strips=((1, strips),), **options)


def error(x: Tensor, spec: PolarSpec) -> float:
    """Relative Frobenius error of the polar factor of x (m, n) against the exact one."""
    exact = polar(x[None].float(), PolarSpec(method="svd"))[0].double()
    got = polar(x[None].to(spec.message_dtype), spec)[0].double()
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("strips", [1, 2, 3, 8])
@pytest.mark.parametrize("side", SIDES)
def test_strips_cover_the_side(side: int, strips: int) -> None:
    cut = symmetric.edges(side, strips)
    assert (cut[0], cut[-1]) == (0, side)
    assert list(cut) == sorted(set(cut))
    assert 2 <= len(cut) <= strips + 1
    done = torch.zeros(side, side)
    for start, stop in pairwise(cut):
        done[start:, start:stop] += 1
    assert done.max() == 1
    assert bool((done.tril() == torch.ones(side, side).tril()).all())
    assert symmetric.share(side, strips) == pytest.approx(float(done.sum()) / side**2)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("strips", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_the_whole_ones_and_mirrored(batch: tuple[int, ...], strips: int, dtype: torch.dtype) -> None:
    for side in SIDES:
        x = (gauss(*batch, side, 2 * side + 3) / side).to(dtype)
        square, cut = symmetric.empty(x, strips), symmetric.edges(side, strips)
        assert square.shape == (*batch, side, side)
        assert square.stride(-2) == symmetric.stride(side, dtype, strips)
        symmetric.matmul(x, x.mT, out=square.fill_(math.nan), strips=strips)
        rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(square, x @ x.mT, **rounding)
        both = symmetric.empty(x, strips).fill_(math.nan)
        symmetric.addmm(square, square, square, beta=-2.0, alpha=0.5, out=both, strips=strips)
        whole = -2.0 * square.double() + 0.5 * square.double() @ square.double()
        torch.testing.assert_close(both, whole.to(dtype), **rounding)
        for result in (square, both):
            for start, stop in pairwise(cut):
                assert torch.equal(result[..., start:stop, stop:], result[..., stop:, start:stop].mT)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """What torch.empty returns holds NaN, between rows too, as a used allocation may."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("batch", [(), (3,)])
def test_nothing_is_read_of_what_memory_held(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """oneDNN with AMX reads a left factor's rows beyond their end: NaN there made NaN at 88 of these 107 sides."""
    assert torch.empty(1, dtype=dtype).isnan()
    for side in range(33, 140):
        x = (gauss(*batch, side, side + 3) / side).to(dtype)
        square, both = symmetric.empty(x, 3), symmetric.empty(x, 3)
        assert not square.as_strided((square.stride(-2) * side,), (1,)).view(side, -1)[:, side:].any()
        symmetric.matmul(x, x.mT, out=square, strips=3)
        symmetric.addmm(square, square, square, beta=1.0, alpha=1.0, out=both, strips=3)
        assert bool(both.isfinite().all())


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("method", ["standard", "gram", "svd"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_polar_reads_nothing_of_what_memory_held(dtype: str, method: str) -> None:
    for strips in (1, 3):
        spec = cut_into(strips, method=method, dtype="float32" if method == "svd" else dtype)
        for m, n in [(1, 1), (31, 100), (97, 200), (200, 130), (70, 70)]:
            x = gauss(2, m, n).to(spec.message_dtype)
            assert bool(polar(x, spec).isfinite().all())
            assert not polar(torch.zeros_like(x), spec).any()


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_does_not_see_strips(name: str, method: str) -> None:
    for m, n in [(1, 9), (70, 70), (100, 161), (161, 100), (130, 400)]:
        x = gauss(2, m, n)
        whole = polar(x, cut_into(1, schedule=name, method=method, dtype="float32"))
        for strips in (2, 3, 8):
            cut = polar(x, cut_into(strips, schedule=name, method=method, dtype="float32"))
            torch.testing.assert_close(cut, whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("method", "more"), [("standard", 0.002), ("gram", 0.02)])
def test_bfloat16_is_as_exact_in_strips(method: str, more: float, name: str, normalize: str) -> None:
    """Against the exact factor."""
    for x in (
        gauss(256, 512),
        gauss(400, 256),
        with_spectrum(1 / torch.arange(1, 257), 384),
        with_spectrum(torch.logspace(0, -3, 256), 256),
        with_spectrum(torch.logspace(0, -3, 256), 384).mT,
    ):
        options: dict[str, Any] = {"schedule": name, "method": method, "dtype": "bfloat16", "normalize": normalize}
        whole = error(x, cut_into(1, **options))
        for strips in (2, 4, 8):
            assert error(x, cut_into(strips, **options)) < whole + more


def test_a_tall_matrix_is_as_exact_as_a_wide_one() -> None:
    x = with_spectrum(torch.logspace(0, -3, 128), 256)
    for strips in (1, 4):
        spec = cut_into(strips, schedule="polar_express", method="gram", dtype="bfloat16")
        assert error(x.mT.contiguous(), spec) == pytest.approx(error(x, spec), abs=0.01)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_bits_in_strips_depend_on_the_matrix_alone(dtype: str, method: str) -> None:
    spec = cut_into(3, method=method, dtype=dtype)
    for m, n in [(100, 100), (97, 200), (200, 130)]:
        batch = gauss(3, m, n).to(spec.message_dtype)
        together = polar(batch, spec)
        flat = torch.empty(m * n + 7, dtype=batch.dtype)
        for index, x in enumerate(batch):
            flat[7:] = x.flatten()
            assert torch.equal(polar(x[None].clone(), spec)[0], together[index])
            assert torch.equal(polar(flat[7:].view(1, m, n), spec)[0], together[index])


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_batches_are_done_as_single_matrices_are(method: str) -> None:
    """The path of CUDA, batched products, here on a CPU."""
    for m, n in [(100, 161), (161, 100)]:
        x = gauss(3, m, n)
        iterate = newton_schulz.gram if method == "gram" else newton_schulz.standard
        for strips in (1, 3):
            options: dict[str, Any] = {"dtype": torch.float32, "schatten4": False, "strips": strips}
            together = iterate(x, schedule("keller", 5), **options)
            for index, matrix in enumerate(x):
                alone = iterate(matrix, schedule("keller", 5), **options)
                torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["frobenius", "schatten4"])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zero_and_rank_one_in_strips(dtype: str, method: str, normalize: str) -> None:
    spec = cut_into(4, method=method, dtype=dtype, normalize=normalize)
    zero = torch.zeros(1, 100, 130, dtype=spec.message_dtype)
    assert torch.equal(polar(zero, spec), zero)
    one = polar(torch.ones(1, 100, 130, dtype=spec.message_dtype), spec).float()
    assert bool(one.isfinite().all())
    assert float(torch.linalg.matrix_norm(one[0], ord=2)) == pytest.approx(0.9, abs=0.35)
    assert float(one.std()) < 0.1 * float(one.mean())


def test_strips_by_short_side() -> None:
    spec = PolarSpec(strips=((64, 2), (256, 8)))
    sides = {(63, 900): 1, (64, 900): 2, (900, 255): 2, (256, 256): 8, (5000, 5000): 8}
    assert {shape: spec.strips_for(*shape) for shape in sides} == sides
    assert PolarSpec().strips_for(4096, 4096) == 1
    cuda = PolarSpec().resolve(torch.device("cuda"))
    assert (cuda.strips_for(4095, 9000), cuda.strips_for(4096, 9000)) == (1, 2)
    assert PolarSpec(method="svd").resolve(CPU).strips == ()


def test_a_matrix_unit_has_strips_and_an_aspect_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        found[amx] = {d: (dispatch.default_gram_from(CPU, d), dispatch.default_strips(CPU, d)) for d in DTYPES}
    assert found[True].pop("bfloat16") == (2.0, ((768, 2), (1024, 4)))
    assert found[False].pop("bfloat16") == (1.5, ((384, 2), (768, 6), (1024, 8), (2048, 16)))
    assert found[True] == found[False], "it takes no products of theirs"


def test_more_threads_cut_larger_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    two = dispatch.default_strips(CPU, "bfloat16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert dispatch.default_strips(CPU, "bfloat16") == tuple((2 * side, strips) for side, strips in two)


def test_stored_strips_are_taken(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    stored = {"gram_from": 1.25, "strips": {"1024": 8, "96": 2}}
    dispatch.store(CPU, {"float32": stored, "bfloat16": {"gram_from": 1.5, "strips": {}}})
    spec = PolarSpec(dtype="float32").resolve(CPU)
    assert (spec.gram_from, spec.strips) == (1.25, ((96, 2), (1024, 8)))
    assert PolarSpec(dtype="bfloat16").resolve(CPU).strips == (), "measured, and none wins"
    assert PolarSpec(dtype="float16").resolve(CPU).strips == dispatch.default_strips(CPU, "float16")
    assert PolarSpec(dtype="float32", strips=((1, 2),)).resolve(CPU).strips == ((1, 2),), "rank 0's choice stays"


def test_a_table_of_another_gram_form_counts_as_none(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    stored = {"gram_from": 1.01, "strips": {"64": 2}}
    old = {"version": 1, "devices": {dispatch.device_name(CPU): {"bfloat16": stored}}}
    dispatch.table_path().write_text(json.dumps(old))
    spec = PolarSpec(dtype="bfloat16").resolve(CPU)
    assert spec.gram_from == dispatch.default_gram_from(CPU, "bfloat16")
    assert spec.strips == dispatch.default_strips(CPU, "bfloat16")
    assert "measure anew" in caplog.text
    dispatch.store(CPU, {"bfloat16": stored})
    assert PolarSpec(dtype="bfloat16").resolve(CPU).gram_from == 1.01


@pytest.mark.parametrize("aspect", [-2.0, float("nan"), float("inf"), True, "1.5", [1.5]])
def test_an_aspect_that_is_none_counts_as_not_measured(
    aspect: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    table = {"version": dispatch.VERSION, "devices": {dispatch.device_name(CPU): {"float32": {"gram_from": aspect}}}}
    dispatch.table_path().write_text(json.dumps(table))
    assert dispatch.gram_from(CPU, "float32") is None
    assert "is no aspect" in caplog.text


@pytest.mark.parametrize("strips", [{"64": 0}, {"64": 1.5}, {"x": 2}, [64, 2], {"64": True}, {"64": 65}])
def test_damaged_strips_count_as_none(strips: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path))
    dispatch.store(CPU, {"float32": {"gram_from": 3.0, "strips": strips}})
    assert dispatch.strips(CPU, "float32") is None
