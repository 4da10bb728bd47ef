"""Compiled steps and orthogonalization on this machine's device, against the eager path on its CPU.

Where bits are the same by design no element may differ. Where a library adds in an order of its own, the distance of
two results is compared with the way that they went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ds_optim.accept.checks import AcceptSettings, Check, within
from ds_optim.accept.given import Subject, distance, step_alone, subjects
from ds_optim.bench.elementwise import COMPILED, EAGER, LION, choose, no_compiled_path
from ds_optim.elementwise.blend import blend_into
from ds_optim.elementwise.momentum import WEIGHTS, Bfloat16, Flat, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.elementwise.steps import adamw_step, apply_update, sign_step
from ds_optim.matrix.polar import DTYPES, PolarSpec, polar
from ds_optim.matrix.schedules import SCHEDULES
from ds_optim.matrix.shapes import WEIGHT_BASIS

PLACES = ((0, 5000), (77, 3001), ((1 << 40) + 257, 1024))
"""(first element in its parameter, elements)."""
_MOMENTA = ("none", "float32", "bfloat16", "int8")
_WIDE = ("float32", "bfloat16")
_ROOT = 1e-6
"""AdamW's root and quotient may be a last bit off."""
_MATRIX_LIMITS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Of an orthogonalized matrix, by the dtype of computation; TF32 would be 3e-3."""
_SHAPES = ((96, 96), (96, 288), (256, 128), (1, 40))
_MATRIX_RULE = 1e-3
_SIGNS = 0.1
"""Of a step by signs of what was orthogonalized: one sign in some thousands may be another."""
_SIGNS_OF_BLENDS = "spectral_lion_gradient"


@dataclass(frozen=True)
class _Case:
    """A step of flat tensors: what it is called with, and how far apart results may be (0: no bit)."""

    name: str
    where: str
    step: Callable[..., object]
    tensors: tuple[Flat | None, ...]
    limit: float = 0.0


def run(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """Every kernel and dtype, every rule's step, every schedule, method and dtype of orthogonalization."""
    device = torch.device(settings.device)
    missing = no_compiled_path(device)
    yield Check(name="compiled steps", ok=missing is None, note=missing or "they take this device's tensors")
    for case in _cases(PLACES[:2] if settings.quick else PLACES):
        yield _step_check(case, device)
    for subject in list(subjects(("float32", "bfloat16", "int8")))[:: 5 if settings.quick else 1]:
        yield _rule_check(subject, device)
    missing = no_compiled_path(device)  # one that failed on the way left its work to the eager path
    yield Check(name="compiled steps", where="after all of these", ok=missing is None, note=missing or "still taken")
    dtypes = list(DTYPES) if device.type == "cuda" else ["float32", "bfloat16"]
    for dtype in dtypes:
        for schedule, method, shape in product(SCHEDULES, ("standard", "gram"), _SHAPES[:: 2 if settings.quick else 1]):
            yield _matrix_check(PolarSpec(schedule=schedule, method=method, dtype=dtype), shape, device)


def _values(n: int, seed: int) -> Tensor:
    """Normal numbers of many sizes, and exact zeros."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(-9, 9, (n,), generator=draw, dtype=torch.int64, device="cpu")
    values = torch.randn(n, generator=draw, dtype=torch.float32, device="cpu") * torch.exp2(powers.float())
    zero = torch.rand(n, generator=draw, dtype=torch.float32, device="cpu") < 0.05
    return values.masked_fill_(zero, 0.0)


def _stored(kind: str, values: Tensor, start: int, step: int = 7) -> Flat | None:
    rounding = NoiseKey(seed=2**35 + 3, stream=2**32 - 5, step=step, start=start)
    if kind == "none":
        return None
    if kind == "float32":
        return values
    if kind == "bfloat16":
        return Bfloat16(rounding=rounding, values=values.bfloat16())
    scales = torch.zeros(scales_numel(start, values.numel()), dtype=torch.float32, device=values.device)
    made = Int8(rounding=rounding, codes=torch.zeros_like(values, dtype=torch.int8), scales=scales)
    made.store(0, values.clone())
    return made


def _cases(places: tuple[tuple[int, int], ...]) -> Iterator[_Case]:
    for start, n in places:
        a, b, c = (_values(n, seed) for seed in (1, 2, 3))
        where = f"{n} elements from {start}"
        for p, m, g in product(_WIDE, _MOMENTA, _WIDE):
            step: Callable[..., object] = partial(sign_step, blend=LION, lr=1e-3, decay=0.1, scale=0.7)
            tensors = _stored(p, a, start, WEIGHTS + 5), _stored(m, b, start), _stored(g, c, start)
            yield _Case("sign_step", f"{p}, {m} momentum, {g} gradient, {where}", step, tensors)
        for out, m, g in product((*_WIDE, "float16"), _MOMENTA, _WIDE):
            result = torch.zeros(n, dtype=getattr(torch, out), device="cpu")
            tensors = result, _stored(m, b, start), _stored(g, c, start)
            step = partial(blend_into, blend=LION)
            yield _Case("blend_into", f"{out}, {m} momentum, {g} gradient, {where}", step, tensors)
        for p, update in product(_WIDE, (b, b.bfloat16(), b.half(), b.sign().char())):
            step = partial(apply_update, lr=0.02, decay=0.1, scale=0.3)
            yield _Case("apply_update", f"{p}, {update.dtype}, {where}", step, (_stored(p, a, start, WEIGHTS), update))
        for p, g in product(_WIDE, _WIDE):
            step = partial(adamw_step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=3)
            of_all = _stored(p, a, start, WEIGHTS), b, c.abs(), _stored(g, c, start)
            limit = _ROOT if p == "float32" else 2.0**-8
            yield _Case("adamw_step", f"{p}, {g} gradient, {where}", step, of_all, limit)


def _copied(values: Flat | None, device: torch.device) -> Flat | None:
    if isinstance(values, Int8):
        return replace(values, codes=values.codes.clone().to(device), scales=values.scales.clone().to(device))
    if isinstance(values, Bfloat16):
        return replace(values, values=values.values.clone().to(device))
    return None if values is None else values.clone().to(device)  # type: ignore[union-attr]


def _held(values: Flat | None) -> list[Tensor]:
    if isinstance(values, Int8):
        return [values.codes, values.scales]
    return [] if values is None else [values if isinstance(values, Tensor) else values.data]


def _step_check(case: _Case, device: torch.device) -> Check:
    expected, got = ([_copied(values, place) for values in case.tensors] for place in (torch.device("cpu"), device))
    choose(EAGER)
    case.step(*expected)
    choose(COMPILED)
    case.step(*got)
    pairs = [
        pair for one, other in zip(expected, got, strict=True) for pair in zip(_held(one), _held(other), strict=True)
    ]
    if case.limit == 0:
        differ = sum(int((one != other.cpu()).sum()) for one, other in pairs)
        return within(case.name, differ, 0, where=case.where, unit="elements differ")
    apart = max(_relative(other.cpu(), one) for one, other in pairs)
    return within(case.name, apart, case.limit, where=case.where, unit="of a value")


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two values in units of the one expected."""
    apart = (found.double() - expected.double()).abs()
    return float((apart / expected.double().abs().clamp_(min=1e-30)).masked_fill_(apart == 0, 0.0).max())


def _rule_check(subject: Subject, device: torch.device) -> Check:
    name, where = f"{subject.name}, alone", f"{subject.momentum_dtype} momentum"
    try:
        choose(EAGER)
        expected = step_alone(subject, torch.device("cpu"))
        choose(COMPILED)
        got = step_alone(subject, device)
    except Exception as problem:
        return failed(name, problem, where)
    apart, worst = distance(got, expected)
    return within(name, apart, limit_of(subject), where=where, unit="of the way", note=worst if apart else "")


def limit_of(subject: Subject) -> float:
    """How far two runs of a rule may end apart, in units of the way, where each had other libraries."""
    shape = subject.rule.shape
    if shape is None:
        return _ROOT
    signs = shape.result is not None or shape is WEIGHT_BASIS or subject.rule.name == _SIGNS_OF_BLENDS
    return _SIGNS if signs else _MATRIX_RULE


def _matrix_check(spec: PolarSpec, shape: tuple[int, int], device: torch.device) -> Check:
    """Against the same schedule in fp32 on the CPU, by the standard form."""
    name = f"polar, {spec.schedule}, {spec.dtype}"
    where = f"{shape[0]}x{shape[1]}, {spec.method}"
    # Three of a stack, whose singular values lie between a tenth and one.
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, *shape, generator=draw, dtype=torch.float32, device="cpu")
    u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
    x = u @ (torch.linspace(1.0, 0.1, min(shape), dtype=torch.float32, device="cpu").unsqueeze(-1) * vh)
    try:
        plain = replace(spec, dtype="float32", method="standard").resolve(torch.device("cpu"))
        expected = polar(x, plain).double()
        spec = spec.resolve(device)
        got = polar(x.to(device, spec.message_dtype), spec).cpu().double()
    except Exception as problem:
        return failed(name, problem, where)
    apart = float((got - expected).norm() / expected.norm())
    return within(name, apart, _MATRIX_LIMITS[spec.dtype], where=where, unit="of its norm")


def failed(name: str, problem: Exception, where: str = "") -> Check:
    """The check that ended with an exception."""
    from ds_optim.machine.child import reason_line

    return Check(name=name, where=where, ok=False, note=reason_line(problem))
