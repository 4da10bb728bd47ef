"""What holds its values elsewhere than in plain memory is refused in one line: kernels take addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ds_optim
from ds_optim.elementwise.native import steps as native_steps
from ds_optim.errors import UserError

RULES = ("Lion", "StableLion", "LionMuon")


class Elsewhere(Tensor):
    """Its memory is another tensor's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise AssertionError(func)


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def flattened(model: nn.Module) -> nn.Module:
    """What FSDP1 makes of a model; its parameters stay torch's own, of one dimension, under ``use_orig_params``."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def sparse(model: nn.Module) -> nn.Module:
    model.weight = nn.Parameter(torch.eye(4).to_sparse())
    return model


def elsewhere(model: nn.Module) -> nn.Module:
    model.weight = nn.Parameter(Elsewhere(torch.zeros(4, 4)))
    return model


def refused(work: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(UserError) as found:
        work()
    assert "\n" not in str(found.value)
    assert all(part in str(found.value) for part in parts), str(found.value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("made", "what"),
    [(sharded, "a DTensor"), (flattened, "a slice of a FlatParameter"), (sparse, "sparse"), (elsewhere, "a Elsewhere")],
    ids=lambda v: str(v)[:20],
)
@pytest.mark.usefixtures("one_rank")
def test_parameters_are_refused_at_construction(name: str, made: Callable[[nn.Module], nn.Module], what: str) -> None:
    model = made(nn.Linear(4, 4))
    refused(
        lambda: getattr(ds_optim, name)(ds_optim.param_groups(model)),
        f"weight is {what} and no plain tensor",
        "shard the model with DeepSpeed's ZeRO (zero_optimization.stage 1 to 3) instead of FSDP",
    )


@pytest.mark.usefixtures("one_rank")
def test_bare_parameters_are_refused_too() -> None:
    refused(lambda: ds_optim.Lion(sharded(nn.Linear(4, 4)).parameters()), "parameter 0 is a DTensor")


@pytest.mark.parametrize("name", RULES)
def test_a_tensor_that_becomes_another_kind_is_refused_at_the_first_step(name: str) -> None:
    model = nn.Linear(4, 4)
    optimizer = getattr(ds_optim, name)(ds_optim.param_groups(model))
    torch.utils.swap_tensors(model.weight, nn.Parameter(Elsewhere(torch.zeros(4, 4))))
    model.bias.grad = torch.ones(4)
    before = model.bias.detach().clone()
    refused(optimizer.step, "weight is a Elsewhere and no plain tensor")
    assert torch.equal(model.bias, before)


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_is_flattened_after_construction_is_refused() -> None:
    """By Muon all of it was stepped as vectors, without a word."""
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = ds_optim.Muon(ds_optim.param_groups(model))
    flattened(model)(torch.ones(2, 4)).sum().backward()
    refused(optimizer.step, "0.weight is a slice of a FlatParameter and no plain tensor")


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_is_sharded_after_construction_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = ds_optim.Lion(ds_optim.param_groups(model))
    sharded(model)(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    (line,) = caplog.messages
    assert "none of its parameters has a gradient" in line
    assert "fully_shard is not supported" in line


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["sparse gradient", "a Elsewhere"])
def test_gradients_are_refused_before_any_write(name: str, kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4, sparse=True))
    optimizer = getattr(ds_optim, name)(ds_optim.param_groups(model))
    before = [p.detach().clone() for p in model.parameters()]
    model[0](model[1](torch.tensor([1, 3]))).sum().backward()
    if kind != "sparse gradient":
        model[1].weight.grad = Elsewhere(torch.zeros(5, 4))
    refused(optimizer.step, "1.weight", kind)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_gradient_still_to_be_negated_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (native_steps.library, lambda: None):
        monkeypatch.setattr(native_steps, "library", library)
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch._neg_view(torch.ones(3))
        ds_optim.SignSGD([("p", p)], lr=1.0).step()
        assert p.tolist() == [1, 1, 1]


def test_fake_tensors_pass_for_plain_ones() -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        optimizer = ds_optim.Lion(ds_optim.param_groups(model))
        assert type(optimizer.param_groups[0]["params"][0]).__name__ == "FakeTensor"
