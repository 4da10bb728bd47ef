"""Torch's default dtype and device are the user's: no tensor of this package takes them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_optim
from ds_optim.elementwise.native import steps as native_steps
from ds_optim.optimizers import OPTIMIZERS
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.sharding.sums import reduce_parameters
from tests.stepping import SmallModel, build, random_grads, take_steps
from tests.unit.test_optimizers import CASES

pytestmark = pytest.mark.full

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
    *("triu_indices", "zeros"),
}
NOT_NARROW = ("Lamb", "StableAdamW", "Dion2")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (name, {**hyper, "momentum_dtype": kind, "diagnostics": True})
    for name, hyper in CASES
    for kind in ("float32", "bfloat16", "int8")
    if kind == "float32" or (name not in NOT_NARROW and "element" not in hyper.values())
]


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def trained(name: str, hyper: Mapping[str, Any], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Weights and state after two steps, the second by an optimizer that loaded the first one's state."""
    models, grads = [SmallModel(), SmallModel()], random_grads(2)
    models[1].load_state_dict(models[0].state_dict())
    with defaults(dtype, device):
        first, second = (build(name, model, **hyper) for model in models)
        take_steps(models[0], first, grads[:1])
        with torch.no_grad():
            for here, there in zip(models[0].parameters(), models[1].parameters(), strict=True):
                there.copy_(here)
        second.load_state_dict(first.state_dict())
        take_steps(models[1], second, grads[1:])
    state = [v for entry in second.state.values() for v in entry.values() if torch.is_tensor(v)]
    return [*models[1].parameters(), *state]


@pytest.mark.parametrize("path", ["native", "eager"])
@pytest.mark.parametrize(("name", "hyper"), VARIANTS)
def test_no_default_of_torch_changes_a_bit(
    name: str, hyper: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "eager":
        monkeypatch.setattr(native_steps, "library", lambda: None)
    expected = trained(name, hyper, torch.float32, "cpu")
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "meta")):
        found = trained(name, hyper, dtype, device)
        assert [(t.dtype, t.device) for t in found] == [(t.dtype, t.device) for t in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), (dtype, device)


def test_every_optimizer_is_among_them() -> None:
    assert {name for name, _ in VARIANTS} == set(OPTIMIZERS)


def test_joined_numbers_are_on_the_cpu_where_nobody_asks_for_a_device() -> None:
    (unit,) = build_layout([[ParamSpec(name="w", shape=(3,))]], stage=0, world_size=1).units
    with defaults(torch.float16, "meta"):
        rows = reduce_parameters(unit, Comm(), lambda held: [2.0], columns=1)
    assert rows.tolist() == [[2.0]]


def unnamed(source: str) -> list[int]:
    """Lines of calls of torch's factories that leave dtype or device to a default."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
    ]


def test_every_tensor_that_is_made_names_its_dtype_and_device() -> None:
    root = Path(ds_optim.__file__).parent
    found = {str(file.relative_to(root)): unnamed(file.read_text()) for file in sorted(root.rglob("*.py"))}
    assert len(found) > 100
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_the_check_sees_what_is_left_out() -> None:
    assert unnamed(
        "torch.zeros(3)\ntorch.empty(3, dtype=d)\ntorch.full((), 1.0, device=e)\ntorch.ones(1, dtype=d, device=e)"
    ) == [1, 2, 3]
