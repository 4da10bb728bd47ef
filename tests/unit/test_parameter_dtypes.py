"""Every rule on parameters of every dtype, against the fp64 reference: nothing is read where it was written over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_optim.elementwise.chunks import Scratch
from ds_optim.errors import UserError
from ds_optim.sharding.sums import square_sum
from tests import cases, reference
from tests.stepping import CONV_VIEW, Grads, SmallModel, build, random_grads, take_steps, weights_of
from tests.unit.test_optimizers import (
    CASES,
    NAMES,
    RATES,
    SMALL,
    NearZero,
    for_package,
    for_reference,
    normwise,
    orthogonalized,
    worst,
)

STEPS = 12
HALVES = (torch.bfloat16, torch.float16)
NARROW = ("bfloat16", "int8")
# Numbers of a whole parameter are rounded to 24 bits, so that ranks agree on them, and so are the norms in them.
ROUNDED_ONCE = {"StableLion", "Lamb", "StableAdamW", "LASM"}


def grads_in(dtype: torch.dtype) -> list[Grads]:
    return [{key: g.to(dtype) for key, g in entry.items()} for entry in random_grads(STEPS)]


def referred(name: str, hyper: dict[str, Any], start: dict[str, Any], grads: list[Grads], seen: NearZero) -> Any:
    entries = [{key: g.double().numpy() for key, g in entry.items()} for entry in grads]
    return reference.run(name, start, entries, {**for_reference(name, hyper), "matrix_views": CONV_VIEW}, None, seen)


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_fp64_parameters_follow_the_reference_in_fp64(name: str, hyper: dict[str, Any]) -> None:
    hyper, grads, model = {**RATES, **hyper}, grads_in(torch.float64), SmallModel(SMALL).double()
    start = weights_of(model)
    optimizer = build(name, model, **for_package(name, hyper))
    take_steps(model, optimizer, grads)
    ours, theirs = weights_of(model), referred(name, hyper, start, grads, NearZero())
    kept = {v.dtype for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)}
    assert kept <= {torch.float64}
    for parameter, expected in theirs.items():
        error, displacement = ours[parameter] - expected, expected - start[parameter]
        if orthogonalized(name, hyper, parameter):  # matrices are worked on in fp32
            assert normwise(error, displacement) < 1e-5, parameter
        else:
            assert worst(error, displacement) < (1e-7 if name in ROUNDED_ONCE else 1e-13), parameter


@pytest.mark.full
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_16_bit_models_are_stepped_by_fp32_copies(name: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    """As DeepSpeed at stage 0 keeps them: the groups hold a copy of each parameter."""
    hyper, grads, seen = {**RATES, **hyper}, grads_in(dtype), NearZero()
    model = SmallModel(SMALL).to(dtype)
    start = weights_of(model)
    exact = {"polar": {"dtype": "float32"}} if name == "SpectralLion" else {}  # a 16-bit model's travel in 16 bits
    optimizer = build(name, model, **for_package(name, hyper), **exact)
    copies = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [copies[p] for p in group["params"]]
    for entry in grads:
        for key, p in model.named_parameters():
            copies[p].grad = entry[key].float()
        optimizer.step()
    ours = {key: copies[p].detach().double().numpy() for key, p in model.named_parameters()}
    theirs = referred(name, hyper, start, grads, seen)
    assert seen.count <= 2
    for parameter, expected in theirs.items():
        kept = ~seen.masks[parameter]
        error, displacement = (ours[parameter] - expected)[kept], (expected - start[parameter])[kept]
        if orthogonalized(name, hyper, parameter):
            assert normwise(error, displacement) < 1e-3, parameter
        else:
            assert worst(error, displacement) < 1e-6, parameter


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_parameters_without_copies_are_refused_before_any_write(name: str, dtype: torch.dtype) -> None:
    model = SmallModel().to(dtype)
    start = weights_of(model)
    with pytest.raises(UserError, match=rf"{dtype} and nothing keeps fp32 master weights.*\Z"):
        take_steps(model, build(name, model), grads_in(dtype)[:1])
    assert all((start[key] == now).all() for key, now in weights_of(model).items())


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", sorted(set(cases.NARROW) - {"SpectralLion"}))
def test_fp64_parameters_with_narrow_momentum_go_where_fp32_ones_go(name: str, kind: str) -> None:
    """The noise of rounding is the same: few momenta fall on its other side."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = SmallModel(SMALL).to(dtype)
        hyper = for_package(name, {**RATES, "momentum_dtype": kind})
        take_steps(model, build(name, model, **hyper), grads_in(dtype))
        found[dtype] = np.concatenate([w.ravel() for w in weights_of(model).values()])
    apart = np.abs(found[torch.float64] - found[torch.float32])
    assert np.mean(apart > 1e-5 * np.abs(found[torch.float64]).max()) < 0.02


def test_no_two_buffers_that_are_lent_are_one() -> None:
    scratch, like = Scratch(), torch.zeros(9, dtype=torch.float64)
    with scratch.lend(like, 2, 2) as outer, scratch.lend(like, 1, 1) as inner:
        assert all(buffer.dtype == torch.float64 and buffer.shape == like.shape for buffer in (*outer, *inner))
        assert len({buffer.data_ptr() for buffer in (*outer, *inner)}) == 6
    with scratch.lend(torch.zeros(7, dtype=torch.float64), 2, 4) as again:
        assert {b.data_ptr() for b in again} == {b.data_ptr() for b in (*outer, *inner)}, "they are kept, and reused"


def test_a_sum_of_squares_leaves_its_input() -> None:
    values = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert float(square_sum(values)) == 25
    assert values.tolist() == [3.0, -4.0]
