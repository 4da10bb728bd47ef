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

from ds_optim.elementwise import blend, fused, moments, native, passes, sign_rules, steps
from ds_optim.elementwise.blend import Blend
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.gpu import launch, row_launch
from ds_optim.elementwise.moments import Moments
from ds_optim.elementwise.momentum import WEIGHTS, Bfloat16, Flat, Int8, scales_numel
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.layout import Slice
from ds_optim.sharding.selection import Chosen, add_row_sums
from ds_optim.sharding.sums import square_sum

LION, SIGNUM = Blend((0.9, 1 - 0.9), (0.99, 1 - 0.99)), Blend((0.9, 1 - 0.9), (0.9, 1 - 0.9))
FORMULAS = (LION, SIGNUM)
KINDS, MOMENTA = ("float32", "bfloat16"), ("none", "float32", "bfloat16", "int8")
PLACES = ((0, 1), (0, 256), (77, 300), (255, 2), (512, 1024), ((1 << 40) + 257, 1000))
"""(first element in the parameter, elements)."""
TOGETHER = ((0, 1), (77, 300), (300, 0), (255, 2), (1 << 33, 300), (3, 0))
"""Slices of one launch, among them empty ones."""
LONG = (1 << 33) + 5, 4500
"""One more where they are measured, which several programs do."""
MIXED = (
    ("float32", "float32", "float32"), ("float32", "bfloat16", "bfloat16"), ("float32", "int8", "float32"),
    ("bfloat16", "float32", "bfloat16"), ("bfloat16", "bfloat16", "float32"), ("bfloat16", "int8", "bfloat16"),
)  # fmt: skip
"""Kinds of p, m and g, each pair of them."""
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
    if values.numel():
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


Call = tuple[Callable[..., object], tuple[Flat | None, ...]]
"""A step or measure, and the tensors of a slice."""


@dataclass(frozen=True)
class Case:
    """Slices that go in one launch. shift: where their tensors begin in their memory, in elements."""

    name: str
    calls: tuple[Call, ...]
    shift: int

    def complaint(self, device: str) -> str:
        """Take the slices eagerly on the CPU and by a kernel on ``device``: what differs."""
        expected = [tuple(moved(values, "cpu", 0) for values in tensors) for _, tensors in self.calls]
        got = [tuple(moved(values, device, self.shift) for values in tensors) for _, tensors in self.calls]
        steps_ = [step for step, _ in self.calls]
        with mock.patch.object(native.steps, "library", return_value=None):
            with mock.patch.object(fused, "ready", return_value=False), mock.patch.object(torch, "sqrt", exact_root):
                measured = [step(*one) if one[-1].numel() else None for step, one in zip(steps_, expected, strict=True)]
            with ExitStack() as stack:
                launches = [
                    stack.enter_context(mock.patch.object(room, "_start", wraps=room._start))
                    for room in (launch, row_launch)
                ]
                for module, name in ((steps, "chunks"), (blend, "chunks"), (passes, "spans"), (sign_rules, "spans")):
                    stack.enter_context(mock.patch.object(module, name, _no_eager_path))
                stack.enter_context(mock.patch.object(fused, "ready", return_value=True))
                stack.enter_context(mock.patch.object(launch, "_launched", _All()))
                stack.enter_context(fused.together())
                found = [step(*one) for step, one in zip(steps_, got, strict=True)]
        count = sum(start.call_count for start in launches)
        if count != 1:
            return f"{count} launches"
        for slice_, (before, after, one, other) in enumerate(zip(measured, found, expected, got, strict=True)):
            wrong = _differing(before, after) or _first_differing(one, other)
            if wrong:
                return f"slice {slice_}: {wrong}"
        return ""


class _All:
    """Kinds of slices that are known to compile: all, so that none is launched by itself."""

    def __contains__(self, kind: object) -> bool:
        return True


def _differing(expected: Any, found: Any) -> str:
    """Sums to a part in 10^13, as their order is another one; all else to the bit. None of an empty slice."""
    if expected is None:
        return ""
    one, other = (torch.stack(x) if isinstance(x, list) else x for x in (expected, found))
    same = torch.allclose(one, other.cpu(), rtol=1e-13, atol=0, equal_nan=True)
    return "" if same else f"{one.tolist()} became {other.tolist()}"


def _first_differing(expected: tuple[Flat | None, ...], found: tuple[Flat | None, ...]) -> str:
    for place, (one, other) in enumerate(zip(expected, found, strict=True)):
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
    yield from _rules_of_one_mean()
    yield from _rules_of_two()
    yield from _cautious_steps()
    yield from _chosen_rows()


def _sign_steps() -> Iterator[Case]:
    for p, m, g in product(KINDS, MOMENTA, KINDS):
        for number, (start, n) in enumerate(PLACES):
            odd = number in (2, 5)
            step = partial(
                steps.sign_step, blend=FORMULAS[number % 2], lr=1e-3 * (number + 1), decay=number % 3 * 0.1, scale=0.7
            )
            weights = stored(p, gauss(n, 1, odd), start, WEIGHTS + 5)
            tensors = (weights, stored(m, gauss(n, 2, odd), start), stored(g, gauss(n, 3, odd), start))
            yield Case(f"sign_step {p} {m} {g} {start}+{n}", ((step, tensors),), start % 2 * 3)


def _blends() -> Iterator[Case]:
    for out, m, g in product((*KINDS, "float16"), MOMENTA, KINDS):
        for (start, n), formula in zip(PLACES[3:5], FORMULAS, strict=True):
            result = torch.zeros(n, dtype=getattr(torch, out))
            gradient = stored(g, gauss(n, 3, odd=out != "float16"), start)
            tensors = (result, stored(m, gauss(n, 2), start), gradient)
            step = partial(blend.blend_into, blend=formula)
            yield Case(f"blend_into {out} {m} {g} {start}+{n}", ((step, tensors),), start % 2 * 3)
    yield Case("blend_into g", ((lambda m, g: blend.blend_into(g, m, g, LION), (gauss(300, 2), gauss(300, 3))),), 1)


def _updates() -> Iterator[Case]:
    for p, (start, n) in product(KINDS, PLACES[2:5]):
        weights, values = stored(p, gauss(n, 1), start, WEIGHTS + 5), gauss(n, 2)
        updates: list[Flat | None] = [values, values.bfloat16(), values.half(), values.nan_to_num(0.0).sign().char()]
        updates += [stored("bfloat16", values, start), stored("int8", values, start)]
        step: Callable[..., object] = partial(steps.apply_update, lr=0.02, decay=0.1, scale=0.3)
        for update in updates:
            assert update is not None
            name = f"apply_update {p} {type(update).__name__} {held(update)[0].dtype} {start}+{n}"
            yield Case(name, ((step, (weights, update)),), start % 2 * 3)
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            copied: tuple[Flat, ...] = (torch.zeros(n, dtype=getattr(torch, p)), gauss(n, 5).clamp(-9, 9).to(kind))
            yield Case(f"copy_into {p} {kind} {start}+{n}", ((steps.copy_into, copied),), start % 2 * 3)
        step = partial(steps.adamw_step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=3)
        for g in KINDS:
            tensors = (weights, values, gauss(n, 4).abs(), stored(g, gauss(n, 3), start))
            yield Case(f"adamw_step {p} {g} {start}+{n}", ((step, tensors),), start % 2 * 3)


def _rules_of_one_mean() -> Iterator[Case]:
    common = {"blend": LION, "scratch": Scratch()}
    steps_of = {
        "sign_step": partial(steps.sign_step, **common),
        "cautious_step": partial(sign_rules.cautious_step, scale=0.7, **common),
        "gated_step": partial(sign_rules.gated_step, nu=0.3, **common),
        "raw_step": partial(sign_rules.raw_step, **common),
    }
    for p, m, g in MIXED:
        for name, step in steps_of.items():
            yield _together(f"{name} {p} {m} {g}", (p, m, g), step, decay=0.1)
        if p == g:
            yield _together(f"stochastic_sign_step {p} {m}", (p, m), _stochastic, decay=0.1)
    for _, m, g in MIXED[:3]:
        for name, measured in {
            "agreement": partial(sign_rules.agreement, **common),
            "smallest_nonzero": partial(sign_rules.smallest_nonzero, **common),
            "count_from": partial(sign_rules.count_from, nu=0.3, **common),
            "move_momentum": partial(sign_rules.move_momentum, **common),
            "direction_squares": partial(blend.direction_squares, **common),
            "lasm_difference": partial(moments.lasm_difference, scratch=Scratch()),
        }.items():
            yield _together(f"{name} {m} {g}", (m, g), measured)
    for name in ("smallest_nonzero", "move_momentum"):
        measured = partial(getattr(sign_rules, name), **common)
        for odd in ODD[:2]:
            values = gauss(400, 3)
            values[300] = odd
            yield Case(f"{name} {odd}", ((measured, (gauss(400, 2), values)),), 0)
    for kind in KINDS:
        yield _together(f"square_sum {kind}", (kind,), square_sum)
    for out, m in product((*KINDS, "float16"), MOMENTA[1:]):
        result = torch.zeros(300, dtype=getattr(torch, out))
        call = partial(blend.direction_into, **common), (result, stored(m, gauss(300, 2), 77), gauss(300, 3))
        yield Case(f"direction_into {out} {m}", (call,), 3)


def _rules_of_two() -> Iterator[Case]:
    later = Moments(betas=(0.9, 0.95), eps=1e-3, step=3)
    for p, g in zip(KINDS, reversed(KINDS), strict=True):
        two = {"betas": (0.9, 0.95), "scale": 0.7, "scratch": Scratch()}
        yield _together(
            f"lasm_element_step {p} {g}", (p, "m", "v", g), partial(moments.lasm_element_step, **two), decay=0.1
        )
        yield _together(f"stochastic_element_step {p} {g}", (p, "m", "v", g), _stochastic_element, decay=0.1)
        for decay in (0.0, 0.1):
            measured = partial(moments.lamb_measure, moments=later, decay=decay, scratch=Scratch())
            yield _together(f"lamb_measure {p} {g} {decay}", (p, "m", "v", g), measured)
            step = partial(moments.lamb_step, moments=later, decay=decay, scratch=Scratch())
            yield _together(f"lamb_step {p} {decay}", (p, "m", "v"), step, decay=None)
        measured = partial(moments.stable_measure, moments=later, scratch=Scratch())
        yield _together(f"stable_measure {g}", ("m", "v", g), measured)
        step = partial(moments.stable_step, moments=later, scratch=Scratch())
        yield _together(f"stable_step {p}", (p, "m", "v"), step, decay=0.1)


def _cautious_steps() -> Iterator[Case]:
    one, two = {"blend": LION, "scratch": Scratch()}, {"betas": (0.9, 0.95), "scale": 0.7, "scratch": Scratch()}
    later = Moments(betas=(0.9, 0.95), eps=1e-3, step=3)
    for name, kinds, step in (
        ("sign_step", ("float32", "int8", "bfloat16"), partial(steps.sign_step, **one)),
        ("sign_step", ("float32", "none", "float32"), partial(steps.sign_step, **one)),
        ("cautious_step", ("float32", "bfloat16", "float32"), partial(sign_rules.cautious_step, scale=0.7, **one)),
        ("gated_step", ("float32", "float32", "float32"), partial(sign_rules.gated_step, nu=0.3, **one)),
        ("raw_step", ("float32", "int8", "float32"), partial(sign_rules.raw_step, **one)),
        ("stochastic_sign_step", ("float32", "float32"), _stochastic),
        ("stochastic_element_step", ("float32", "m", "v", "float32"), _stochastic_element),
        ("apply_update", ("float32", "bfloat16"), steps.apply_update),
        ("lasm_element_step", ("float32", "m", "v", "float32"), partial(moments.lasm_element_step, **two)),
        ("stable_step", ("float32", "m", "v"), partial(moments.stable_step, moments=later, scratch=Scratch())),
        ("adamw_step", ("float32", "m", "v", "float32"), partial(steps.adamw_step, betas=(0.9, 0.9), eps=0.1, step=3)),
    ):
        yield _together(f"{name}, cautious {kinds}", kinds, partial(_cautious, step), decay=0.0)


def _cautious(step: Callable[..., object], p: Tensor, *others: Flat | None, **more: Any) -> None:
    """As ``Local.decaying`` does around it, at a rate that shows beside the step."""
    kept: list[Tensor] = []
    if "stochastic" in getattr(step, "__name__", ""):
        more["noise"] = NoiseKey(seed=2**33 + 3, stream=7, step=2**34 + 1, start=77)
    with fused.cautiously(3e-3, lambda: kept.append(p.clone())):
        step(p, *others, **more)
    for old in kept:
        p.sub_(old.mul(3e-3).mul_(torch.sub(old, p).mul_(old).ge_(0)))


ROWS = {
    "rows": (MatrixView(shape=(40, 23)), ((0, 920), (0, 1), (5, 300), (700, 220), (69, 23), (300, 0))),
    "long rows": (MatrixView(shape=(3, 700)), ((0, 2100), (650, 800))),
    "turned": (MatrixView(shape=(2, 9, 300), transpose=True, batch_dims=1), ((0, 5400), (2500, 400), (310, 200))),
}
"""Views, and slices of a parameter: first element, and how many."""


def _chosen_rows() -> Iterator[Case]:
    for name, (view, places) in ROWS.items():
        measured = [(partial(_row_sums, view, start), (gauss(n, start),)) for start, n in places]
        yield Case(f"sum_rows {name}", tuple(measured), 3)
        flags = torch.rand(view.of_rows.numel, generator=torch.Generator().manual_seed(3)) < 0.4
        before = torch.nn.functional.pad(flags.cumsum(0), (1, 0)) + 7  # counted from anywhere
        chosen = Chosen(view, flags, before, before)
        for kind in ("float32", "bfloat16"):
            dtype = getattr(torch, kind)
            taken, stepped = [], []
            for number, (start, n) in enumerate(places):
                first, last = chosen.run(Slice(0, start, n, 0, 0))
                step = partial(_gather, chosen, start)
                taken.append((step, (torch.zeros(last - first, dtype=dtype), gauss(n, number))))
                change = gauss(last - first, number + 9).to(dtype)
                weights = stored(kind, gauss(n, number), start, WEIGHTS + 5)
                stepped.append((partial(_step_rows, chosen, start), (weights, gauss(n, number + 5), change)))
            yield Case(f"gather_rows {name} {kind}", tuple(taken), 0)
            yield Case(f"step_rows {name} {kind}", tuple(stepped), 3)
        cautious = [(partial(_cautious, partial(step, lr=1e-2)), tensors) for step, tensors in stepped]
        wide = [(step, (gauss(tensors[1].numel(), 8), *tensors[1:])) for step, tensors in cautious]
        yield Case(f"step_rows, cautious {name}", tuple(wide), 0)


def _row_sums(view: MatrixView, start: int, m: Tensor) -> Tensor:
    sums = torch.zeros(view.of_rows.numel, dtype=torch.float64, device=m.device)
    add_row_sums(view, start, m, sums)
    return sums


def _on(chosen: Chosen, device: torch.device) -> Chosen:
    return replace(chosen, flags=chosen.flags.to(device), before=chosen.sums.to(device))


def _gather(chosen: Chosen, start: int, out: Tensor, m: Tensor) -> None:
    part = Slice(0, start, m.numel(), 0, 0)
    run = Slice(0, chosen.run(part)[0], out.numel(), 0, 0)
    if not fused.step("gather_rows", (out, m), (_on(chosen, m.device).rows(part, run),)):
        out.copy_(m[chosen.mask(part)])


def _step_rows(chosen: Chosen, start: int, p: Flat, m: Tensor, change: Tensor, lr: float = 0.3) -> None:
    part = Slice(0, start, m.numel(), 0, 0)
    run = Slice(0, chosen.run(part)[0], change.numel(), 0, 0)
    if not fused.step("step_rows", (p, m, change), (lr, 0.9, 0.8, _on(chosen, m.device).rows(part, run))):
        mask = chosen.mask(part)
        update = torch.zeros_like(m)
        update[mask] = change.float()
        steps.apply_update(p, update, lr=lr, decay=0.1 / lr)
        m[mask] *= 0.8


def _together(name: str, kinds: tuple[str, ...], step: Callable[..., object], **rates: float | None) -> Case:
    """Slices at places of their own, of which each has its own rate if they step. rates: None for none."""
    calls: list[Call] = []
    for number, (start, n) in enumerate(TOGETHER if "step" in name else (*TOGETHER, LONG)):
        own = {**rates, "lr": 1e-3 * (number + 1)} if rates else {}
        if step in (_stochastic, _stochastic_element):
            own["noise"] = NoiseKey(seed=2**33 + 3, stream=7 + number, step=2**34 + 1, start=start)
        tensors = []
        for place, kind in enumerate(kinds):
            values = gauss(n, 10 * number + place)
            weights = place == 0 and "step" in name and kind == "bfloat16"
            tensors.append(
                {"m": values, "v": values.abs()}.get(kind)
                if kind in "mv"
                else stored(kind, values, start, WEIGHTS + 5 if weights else 2**33 + 1)
            )
        calls.append((partial(step, **{key: value for key, value in own.items() if value is not None}), tuple(tensors)))
    return Case(name, tuple(calls), 3)


def _stochastic(p: Flat, m: Flat, **more: Any) -> None:
    sign_rules.stochastic_sign_step(p, m, 2.0 + 1e3 * more["lr"], **more, scratch=Scratch())


def _stochastic_element(p: Flat, m: Flat, bounds: Tensor, g: Flat, **more: Any) -> None:
    sign_rules.stochastic_element_step(p, m, bounds, g, blend=SIGNUM, **more, scratch=Scratch())


if __name__ == "__main__":
    print(json.dumps({case.name: case.complaint("cpu") for case in cases()}))
