"""What a step allocates: chunks of bounded size, never a tensor as long as the partition besides p, g and m.

Of the rules that bring matrices together, what travels and is worked on is that of the estimate:
``test_estimate.py::test_exchange_scratch_is_what_a_step_allocates``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_optim.elementwise.chunks import chunk_elements
from ds_optim.elementwise.native import steps as calls
from ds_optim.memory import MemoryWatch
from ds_optim.optimizers import OPTIMIZERS
from tests.cases import NARROW

pytestmark = pytest.mark.full

#: Several chunks of a CPU's, so that a whole tensor is told from a chunk.
NUMEL = 32 * (1 << 17) + 321
DTYPES = ("float32", "bfloat16", "int8")
#: fp32 chunks that a step holds at most: three are the walk's, the rest the eager path's noise, or sums in fp64.
CHUNKS = 16
ELEMENTWISE = [name for name, cls in OPTIMIZERS.items() if not getattr(cls, "has_aux", False)]
ONE_BUFFER = [name for name in ELEMENTWISE if name in NARROW]


class Allocations(TorchDispatchMode):
    """Elements of the largest storage that an operator made while it was entered, and the operator."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._known:
                self.largest = max(self.largest, (leaf.untyped_storage().nbytes(), str(func)))
        return result


def stepped(name: str, device: str, **options: Any) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    """An optimizer after its first step, which makes the state, with the gradient of the next one."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, NUMEL, device=device))
    optimizer = OPTIMIZERS[name]([("weight", parameter)], lr=1e-3, **options)
    parameter.grad = torch.linspace(1, -2, NUMEL, device=device)
    optimizer.step()
    return optimizer, parameter


def held_by(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    state = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    assert parameter.grad is not None
    return [parameter, parameter.grad, *state]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ONE_BUFFER, "Lion, eager", "StableLion, eager"])
def test_no_flat_tensor_is_made_on_cpu(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, eager = name.partition(", ")
    if eager:  # the path that stands in for the compiled kernels
        monkeypatch.setattr(calls, "library", lambda: None)
    optimizer, parameter = stepped(name, "cpu", momentum_dtype=dtype)
    bound = 4 * chunk_elements(parameter.device)
    with MemoryWatch() as watch, Allocations(held_by(optimizer, parameter)) as seen:
        before = watch.held()
        optimizer.step()
        peak = watch.peak().allocated - before
    assert seen.largest[0] <= 2 * bound, f"a chunk, in fp64 where sums need it: {seen.largest}"
    assert peak <= CHUNKS * bound
    assert 2 * CHUNKS * bound < 4 * NUMEL, "else a flat tensor could hide"


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - set(ONE_BUFFER)))
def test_the_others_make_none_either(name: str) -> None:
    optimizer, parameter = stepped(name, "cpu")
    bound = 4 * chunk_elements(parameter.device)
    with Allocations(held_by(optimizer, parameter)) as seen:
        optimizer.step()
    assert seen.largest[0] <= 2 * bound, f"a chunk, in fp64 where sums need it: {seen.largest}"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_BUFFER)
def test_no_flat_tensor_is_made_on_cuda(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_optim.elementwise.chunks.CUDA_CHUNK", 1 << 17)
    optimizer, _ = stepped(name, "cuda", momentum_dtype=dtype)
    with MemoryWatch() as watch:
        before = watch.held()
        optimizer.step()
        torch.cuda.synchronize()
        assert watch.peak().allocated - before <= CHUNKS * 4 * (1 << 17)


def test_the_trace_sees_a_flat_tensor() -> None:
    """The test can fail: a step that clones its gradient is caught."""
    optimizer, parameter = stepped("Lion", "cpu")
    optimizer.register_step_pre_hook(lambda *_: None if parameter.grad is None else (parameter.grad.clone(), None)[1])
    with Allocations(held_by(optimizer, parameter)) as seen:
        optimizer.step()
    assert seen.largest == (4 * NUMEL, "aten.clone.default")
