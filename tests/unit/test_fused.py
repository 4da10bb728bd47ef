"""Who does a step on a GPU: Triton's kernels, or the eager path where they cannot, which is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.elementwise import fused, native
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.steps import sign_step

LION = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99))


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "_broken", [])
    fused.wanted.cache_clear()
    yield
    fused.wanted.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """As on a GPU, but that calls of kernels end in an error."""

    def ending_in(problem: Exception) -> None:
        def call(*arguments: Any) -> bool:
            raise problem

        monkeypatch.setattr(fused, "import_module", lambda name: SimpleNamespace(take=call))

    monkeypatch.setattr(fused, "_DEVICE", "cpu")
    monkeypatch.setattr(fused, "find_spec", lambda name: True)
    monkeypatch.setattr(native.steps, "library", lambda: None)
    return ending_in


def two_steps() -> list[float]:
    p = torch.zeros(4)
    for _ in range(2):
        sign_step(p, None, torch.ones(4), blend=Blend((0.0, 1.0), (0.0, 0.0)), lr=0.5, decay=0.0)
    values: list[float] = p.tolist()
    return values


def test_a_compiler_that_fails_leaves_the_work_to_the_eager_path(
    launched: Callable[[Exception], None], caplog: pytest.LogCaptureFixture
) -> None:
    launched(RuntimeError("no C compiler here\nand so on"))
    assert two_steps() == [-1.0] * 4
    (line,) = caplog.messages
    assert line.endswith("(no C compiler here)")


@pytest.mark.parametrize("problem", [TypeError("not so many arguments"), torch.AcceleratorError("the device")])
def test_a_mistake_and_a_broken_device_are_not_the_compilers(
    launched: Callable[[Exception], None], problem: Exception
) -> None:
    launched(problem)
    with pytest.raises(type(problem)):
        two_steps()


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert [fused.ready(torch.device("cuda")) for _ in range(3)] == [False] * 3
    (line,) = caplog.messages
    assert "Triton is not installed" in line


def test_a_switch_asks_for_the_eager_path(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: True)
    assert fused.ready(torch.device("cuda"))
    assert not fused.ready(torch.device("cpu"))
    monkeypatch.setenv("DS_OPTIM_COMPILE", "0")
    fused.wanted.cache_clear()
    assert not fused.ready(torch.device("cuda"))
    assert not caplog.messages


def gauss(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.cuda
def test_an_elements_bits_do_not_depend_on_its_place() -> None:
    p, m, g = (gauss(5000, seed) for seed in range(3))
    parts = [t.clone() for t in (p, m, g)]
    sign_step(p, m, g, blend=LION, lr=1e-3, decay=0.1)
    for begin, end in ((0, 3), (3, 1029), (1029, 5000)):
        sign_step(*(t[begin:end] for t in parts), blend=LION, lr=1e-3, decay=0.1)
    assert torch.equal(p, parts[0])
    assert torch.equal(m, parts[1])
