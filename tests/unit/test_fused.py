"""The compiled GPU steps: the eager path's bits where the compiler rounds as it does, and no compiling twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import fused, native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.steps import apply_update, sign_step

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def gauss(n: int, seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions through the compiler for CPUs, whose roundings can be checked here."""
    monkeypatch.setattr(fused, "_suits", lambda tensor: True)
    monkeypatch.setattr(native.steps, "library", lambda: None)


def steps(device: str, sizes: tuple[int, ...], lr: float) -> list[Tensor]:
    left = []
    for n in sizes:
        p, m, g = (gauss(n, seed, device) for seed in range(3))
        sign_step(p, m, g, blend=LION, lr=lr, decay=0.1)
        out = torch.empty(n, dtype=torch.bfloat16, device=device)
        blend_into(out, m, g, LION)
        apply_update(p, out, lr=lr, decay=0.0, scale=0.3)
        left += [p, m, out]
    return left


@pytest.mark.usefixtures("on_cpu")
def test_bits_are_those_of_the_eager_path_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = torch._dynamo.utils.counters
    counted.clear()
    got = [steps("cpu", (1000, 77, 4099), lr) for lr in (1e-3, 0.02)]
    assert counted["stats"]["unique_graphs"] == 3, "each step is compiled once, and not anew for a length or a rate"
    monkeypatch.setattr(fused, "_suits", lambda tensor: False)
    expected = [steps("cpu", (1000, 77, 4099), lr) for lr in (1e-3, 0.02)]
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_a_compiler_that_fails_leaves_the_work_to_the_eager_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    monkeypatch.setattr(fused, "_compiled", failing)
    monkeypatch.setattr(fused, "_broken", [])
    with caplog.at_level(logging.WARNING):
        p = torch.zeros(4)
        for _ in range(2):
            sign_step(p, None, torch.ones(4), blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.5, decay=0.0)
    assert p.tolist() == [-1.0] * 4
    assert len(caplog.records) == 1


@cuda
def test_a_gpu_is_within_a_rounding_of_the_cpu() -> None:
    """Signs may differ only where the direction is within its last place of 0, momentum by its last place."""
    for one, other in zip(steps("cuda", (100_003,), 1e-3), steps("cpu", (100_003,), 1e-3), strict=True):
        a, b = one.cpu().float(), other.float()
        assert float((a - b).abs().max()) <= 2.0**-7 * float(b.abs().max())
        assert float((a == b).float().mean()) > 0.98


@cuda
def test_an_elements_bits_do_not_depend_on_its_place() -> None:
    p, m, g = (gauss(5000, seed, "cuda") for seed in range(3))
    parts = [t.clone() for t in (p, m, g)]
    sign_step(p, m, g, blend=LION, lr=1e-3, decay=0.1)
    for begin, end in ((0, 3), (3, 1029), (1029, 5000)):
        sign_step(*(t[begin:end] for t in parts), blend=LION, lr=1e-3, decay=0.1)
    assert torch.equal(p, parts[0])
    assert torch.equal(m, parts[1])
