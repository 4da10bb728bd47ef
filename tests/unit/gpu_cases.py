"""The Triton kernels against the eager path on a CPU: every step, dtype and place of a slice, to the bit.

``TRITON_INTERPRET=1 python -m tests.unit.gpu_cases`` runs them in Triton's interpreter, which must be asked for before
Triton is imported, and prints by case what is wrong, "" for nothing. Where there is a GPU, tests run them there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ds_optim.elementwise import blend, fused, native, steps
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.momentum import WEIGHTS, Bfloat16, Flat, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey

LION, SIGNUM = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99)), Blend((0.9, 1 - 0.9), (0.9, 1 - 0.9))
FORMULAS = (LION, SIGNUM)
KINDS, MOMENTA = ("float32", "bfloat16"), ("none", "float32", "bfloat16", "int8")
PLACES = ((0, 1), (0, 256), (77, 300), (255, 2), (512, 1024), ((1 << 40) + 257, 1000))
"""(first element in the parameter, elements)."""
ODD = (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -1e-39, 1.1754944e-38, 0.0, -0.0)


def gauss(n: int, seed: int, odd: bool = False) -> Tensor:
    """Numbers of many sizes and exact zeros; of no size at all if odd, but for whole blocks now and then."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-9, 9, (n,), generator=generator))
    values.masked_fill_(torch.rand(n, generator=generator) < 0.05, 0.0)
    if odd:
        values[::7] = torch.tensor(ODD).repeat(n)[: values[::7].numel()]
        values[250:520] = torch.tensor((1e-39, -2e-42, 0.0, -0.0)).repeat(68)[: values[250:520].numel()]
        values[520:800] = torch.tensor((1e-37, -2e-42, 1.1754944e-38, -3e-38)).repeat(70)[: values[520:800].numel()]
    return values


def stored(kind: str, values: Tensor, start: int, step: int = 2**33 + 1) -> Flat | None:
    """``values`` in ``kind``."""
    rounding = NoiseKey(seed=2**35 + 3, stream=2**32 - 5, step=step, start=start)
    if kind == "none":
        return None
    if kind == "float32":
        return values
    if kind == "bfloat16":
        return Bfloat16(rounding=rounding, values=values.bfloat16())
    scales = torch.zeros(scales_numel(start, values.numel()))
    made = Int8(rounding=rounding, codes=torch.zeros_like(values, dtype=torch.int8), scales=scales)
    made.store(0, values.nan_to_num(0.0, 1e30, -1e30))
    return made


def moved(values: Any, device: str, shift: int) -> Any:
    """A copy on ``device`` that begins ``shift`` elements into its memory."""
    if isinstance(values, Int8):
        return replace(values, codes=moved(values.codes, device, shift), scales=values.scales.clone().to(device))
    if isinstance(values, Bfloat16):
        return replace(values, values=moved(values.values, device, shift))
    return None if values is None else torch.cat([values.new_zeros(shift), values]).to(device)[shift:]


def held(values: Flat | None) -> list[Tensor]:
    if isinstance(values, Int8):
        return [values.codes, values.scales]
    return [] if values is None else [values if isinstance(values, Tensor) else values.data]


@dataclass(frozen=True)
class Case:
    """A step and what it is taken with. shift: where the tensors begin in their memory, in elements."""

    name: str
    step: Callable[..., object]
    tensors: tuple[Flat | None, ...]
    shift: int

    def complaint(self, device: str) -> str:
        """Take the step eagerly on the CPU and by a kernel on ``device``: what differs."""
        expected = [moved(values, "cpu", 0) for values in self.tensors]
        got = [moved(values, device, self.shift) for values in self.tensors]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(native.steps, "library", return_value=None))
            with mock.patch.object(fused, "ready", return_value=False), mock.patch.object(torch, "sqrt", exact_root):
                self.step(*expected)
            for module in (steps, blend):
                stack.enter_context(mock.patch.object(module, "chunks", _no_eager_path))
            stack.enter_context(mock.patch.object(fused, "ready", return_value=True))
            self.step(*got)
        for place, (one, other) in enumerate(zip(expected, got, strict=True)):
            for a, b in zip(held(one), held(other), strict=True):
                wrong = (bits(a) != bits(b.cpu())).nonzero().flatten().tolist()
                if wrong:
                    first = wrong[0]
                    return f"tensor {place}: {len(wrong)} of {len(a)} differ, at {first} {a[first]} became {b[first]}"
        return ""


def exact_root(values: Tensor, *, out: Tensor) -> Tensor:
    """Rounded once: a vector library's root may be a last bit off, and is on a CPU."""
    return out.copy_(values.double().sqrt_())


def _no_eager_path(*_: object, **__: object) -> Iterator[Any]:
    raise AssertionError("the eager path was taken")


def bits(values: Tensor) -> Tensor:
    """What is compared: bits, but that one NaN is as good as another."""
    if not values.is_floating_point():
        return values
    whole = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    return whole.masked_fill(values.isnan(), -1)


def cases() -> Iterator[Case]:
    yield from _sign_steps()
    yield from _blends()
    yield from _updates()


def _sign_steps() -> Iterator[Case]:
    for p, m, g in product(KINDS, MOMENTA, KINDS):
        for number, (start, n) in enumerate(PLACES):
            odd = number in (2, 5)
            step = partial(
                steps.sign_step, blend=FORMULAS[number % 2], lr=1e-3 * (number + 1), decay=number % 3 * 0.1, scale=0.7
            )
            weights = stored(p, gauss(n, 1, odd), start, WEIGHTS + 5)
            tensors = (weights, stored(m, gauss(n, 2, odd), start), stored(g, gauss(n, 3, odd), start))
            yield Case(f"sign_step {p} {m} {g} {start}+{n}", step, tensors, start % 2 * 3)


def _blends() -> Iterator[Case]:
    for out, m, g in product((*KINDS, "float16"), MOMENTA, KINDS):
        for (start, n), formula in zip(PLACES[3:5], FORMULAS, strict=True):
            result = torch.zeros(n, dtype=getattr(torch, out))
            gradient = stored(g, gauss(n, 3, odd=out != "float16"), start)
            tensors = (result, stored(m, gauss(n, 2), start), gradient)
            step = partial(blend.blend_into, blend=formula)
            yield Case(f"blend_into {out} {m} {g} {start}+{n}", step, tensors, start % 2 * 3)
    yield Case("blend_into g", lambda m, g: blend.blend_into(g, m, g, LION), (gauss(300, 2), gauss(300, 3)), 1)


def _updates() -> Iterator[Case]:
    for p, (start, n) in product(KINDS, PLACES[2:5]):
        weights, values = stored(p, gauss(n, 1), start, WEIGHTS + 5), gauss(n, 2)
        updates: list[Flat | None] = [values, values.bfloat16(), values.half(), values.nan_to_num(0.0).sign().char()]
        updates += [stored("bfloat16", values, start), stored("int8", values, start)]
        step: Callable[..., object] = partial(steps.apply_update, lr=0.02, decay=0.1, scale=0.3)
        for update in updates:
            assert update is not None
            name = f"apply_update {p} {type(update).__name__} {held(update)[0].dtype} {start}+{n}"
            yield Case(name, step, (weights, update), start % 2 * 3)
        step = partial(steps.adamw_step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=3)
        for g in KINDS:
            tensors = (weights, values, gauss(n, 4).abs(), stored(g, gauss(n, 3), start))
            yield Case(f"adamw_step {p} {g} {start}+{n}", step, tensors, start % 2 * 3)


if __name__ == "__main__":
    print(json.dumps({case.name: case.complaint("cpu") for case in cases()}))
