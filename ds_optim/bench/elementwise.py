"""One pass over a flat tensor: sign steps by momentum dtype, blends and updates, against fused AdamW and a copy.

All cases work on one fp32 tensor of weights and one of gradients and take turns, the copy among them: its bytes a
second are the limit of the machine. Bytes per element are what a step must read and write once. What a CPU reads in
order to write (write-allocation) is not counted; a copy pays for it and a step in place does not, so that a second
limit stands beside it: a tensor multiplied by one, in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_optim.bench.fused_adamw import deepspeed_adamw, torch_adamw
from ds_optim.bench.timing import (
    Case,
    NotMeasured,
    Outcome,
    Times,
    ratio,
    take_turns_of,
    with_times,
    without_times,
)
from ds_optim.elementwise import fused, native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import BLOCK, WEIGHTS, Bfloat16, Int8, Stored
from ds_optim.elementwise.native.library import library
from ds_optim.elementwise.noise import NoiseKey
from ds_optim.elementwise.steps import adamw_step, apply_update, sign_step
from ds_optim.report.schema import Row

LION = Blend(direction=(0.9, 0.1), momentum=(0.99, 0.01))
_LR, _DECAY = 1e-4, 0.1
_SWITCHES = ("DS_OPTIM_NATIVE", "DS_OPTIM_COMPILE")
COPY, IN_PLACE = "copy", "multiply in place"
TORCH_ADAMW, DEEPSPEED_ADAMW = "torch AdamW, fused", "DeepSpeed AdamW"
MASTERS, ADAMW = "sign step, all in bfloat16", "AdamW step"
EAGER, COMPILED = "eager", "compiled"
#: Bytes of a value of momentum; of int8 with its share of the scale of a block.
MOMENTUM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / BLOCK}


@dataclass(frozen=True, kw_only=True)
class ElementwiseSettings:
    """What is measured. missing: why nothing can be."""

    device: torch.device
    elements: int = 1 << 26
    rounds: int = 9
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The tensors that all cases share, (n,) each, fp32."""

    p: Tensor
    g: Tensor
    out: Tensor


@dataclass(frozen=True)
class Pass:
    """One case: its name and kind, bytes per element, what makes the call to time, and its path (ours have two)."""

    name: str
    what: str
    bytes_per_element: float
    made: Callable[[Flat], Callable[[], object]]
    path: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.path}"


def rows(settings: ElementwiseSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each case."""
    before = {switch: os.environ.get(switch) for switch in _SWITCHES}
    try:
        outcomes = measure(settings)
    finally:
        _use(before)
    for item in all_passes():
        yield to_row(item, outcomes, settings, stamp)


def all_passes() -> Iterator[Pass]:
    """The cases."""
    yield Pass(COPY, "limits", 8, lambda flat: lambda: flat.out.copy_(flat.g))
    yield Pass(IN_PLACE, "limits", 8, lambda flat: lambda: flat.out.mul_(1.0))
    yield Pass(TORCH_ADAMW, "sign step", 28, lambda flat: torch_adamw(flat.p, flat.g, lr=_LR, decay=_DECAY))
    yield Pass(DEEPSPEED_ADAMW, "sign step", 28, lambda flat: deepspeed_adamw(flat.p, flat.g, lr=_LR, decay=_DECAY))
    for path in (COMPILED, EAGER):
        for dtype, width in MOMENTUM_BYTES.items():
            made = partial(_sign_step, dtype=dtype)
            yield Pass(f"sign step, {dtype} momentum", "sign step", 12 + 2 * width, made, path)
        yield Pass(MASTERS, "sign step", 10, _masters_step, path)
        yield Pass(ADAMW, "sign step", 28, _adamw, path)
    for what, make, others in (("blend into", _blend, 12), ("apply", _apply, 8)):
        for path in (COMPILED, EAGER):
            for dtype, width in (("float32", 4), ("bfloat16", 2)):
                yield Pass(f"{what} {dtype}", what, others + width, partial(make, dtype=dtype), path)


def _sign_step(flat: Flat, dtype: str) -> Callable[[], object]:
    scratch = Scratch()
    momentum = stored_momentum(flat.p, dtype)

    def run() -> None:
        nonlocal momentum
        sign_step(flat.p, momentum, flat.g, blend=LION, lr=_LR, decay=_DECAY, scratch=scratch)
        if isinstance(momentum, Stored):
            momentum = replace(momentum, rounding=replace(momentum.rounding, step=momentum.rounding.step + 1))

    return run


def _masters_step(flat: Flat) -> Callable[[], object]:
    """Weights, gradient and momentum in bfloat16."""
    scratch, momentum = Scratch(), stored_momentum(flat.p, "bfloat16")
    rounding = NoiseKey(seed=0, stream=1, step=WEIGHTS, start=0)
    p = Bfloat16(rounding=rounding, values=flat.p.bfloat16())
    g = Bfloat16(rounding=rounding, values=flat.g.bfloat16(), writable=False)
    return lambda: sign_step(p, momentum, g, blend=LION, lr=_LR, decay=_DECAY, scratch=scratch)


def _adamw(flat: Flat) -> Callable[[], object]:
    scratch, m, v = Scratch(), torch.zeros_like(flat.p), torch.zeros_like(flat.p)
    return lambda: adamw_step(
        flat.p, m, v, flat.g, lr=_LR, betas=(0.9, 0.999), eps=1e-8, decay=_DECAY, step=1, scratch=scratch
    )


def _blend(flat: Flat, dtype: str) -> Callable[[], object]:
    scratch, m = Scratch(), torch.zeros_like(flat.p)
    out = torch.empty_like(flat.p, dtype=getattr(torch, dtype))
    return lambda: blend_into(out, m, flat.g, LION, scratch)


def _apply(flat: Flat, dtype: str) -> Callable[[], object]:
    scratch, update = Scratch(), flat.g.to(getattr(torch, dtype))
    return lambda: apply_update(flat.p, update, lr=_LR, decay=_DECAY, scratch=scratch)


def stored_momentum(like: Tensor, dtype: str) -> Tensor | Stored:
    """Momentum of zeros, as long as ``like``."""
    rounding = NoiseKey(seed=0, stream=1, step=1, start=0)
    if dtype == "bfloat16":
        return Bfloat16(rounding=rounding, values=torch.zeros_like(like, dtype=torch.bfloat16))
    if dtype == "int8":
        scales = torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)
        return Int8(rounding=rounding, codes=torch.zeros_like(like, dtype=torch.int8), scales=scales)
    return torch.zeros_like(like)


def measure(settings: ElementwiseSettings) -> dict[str, Outcome]:
    """Times by ``key``; the reason where a case was left out."""
    makers: dict[str, str | Callable[[], Case]] = {}
    flat = None if settings.missing else _flat(settings)
    uncompiled = None if settings.missing else no_compiled_path(settings.device)
    for item in all_passes():
        reason = settings.missing or (uncompiled if item.path == COMPILED else None)
        makers[item.key] = partial(_case, item, flat) if reason is None and flat is not None else str(reason)
    return take_turns_of(makers, settings.device, settings.rounds)


def _flat(settings: ElementwiseSettings) -> Flat:
    generator = torch.Generator(settings.device).manual_seed(0)
    p, g = (torch.empty(settings.elements, dtype=torch.float32, device=settings.device) for _ in range(2))
    p.normal_(0, 0.02, generator=generator)
    g.normal_(0, 1e-3, generator=generator)
    return Flat(p=p, g=g, out=torch.empty_like(p))


def _case(item: Pass, flat: Flat) -> Case:
    prepare = partial(choose, item.path)
    prepare()
    return Case(name=item.key, run=item.made(flat), prepare=prepare)


def no_compiled_path(device: torch.device) -> str | None:
    """Why a step on ``device`` is not taken by the compiled kernels, if it is not."""
    choose(COMPILED)
    p, m, g = (torch.zeros(BLOCK, dtype=torch.float32, device=device) for _ in range(3))
    arguments = p, m, g, (*LION.direction, *LION.momentum), 0.0, 1.0
    if native.sign_step(*arguments) or fused.step("sign_step", arguments[:3], arguments[3:]):
        return None
    missing = {"cpu": "no C compiler was found", "cuda": "Triton is missing, or cannot compile"}
    return missing.get(device.type, f"there are no compiled kernels for {device.type}")


def choose(path: str) -> None:
    """Let the next steps take ``path``, whatever they took before."""
    if path:
        _use(dict.fromkeys(_SWITCHES, "0" if path == EAGER else "1"))


def _use(values: Mapping[str, str | None]) -> None:
    if all(os.environ.get(switch) == value for switch, value in values.items()):
        return
    for switch, value in values.items():
        if value is None:
            os.environ.pop(switch, None)
        else:
            os.environ[switch] = value
    library.cache_clear()
    fused.wanted.cache_clear()


def to_row(item: Pass, outcomes: Mapping[str, Outcome], settings: ElementwiseSettings, stamp: Mapping[str, Any]) -> Row:
    """One case's row, with its ratios to AdamW and to the copy of the same run."""
    outcome = outcomes[item.key]
    row = Row(kind="elementwise", optimizer=item.name, dtype="fp32")
    row.extra = {
        "what": item.what,
        "path": item.path or None,
        "elements": settings.elements,
        "bytes_per_element": item.bytes_per_element,
        "threads": torch.get_num_threads(),
        "device": settings.device.type,
        **stamp,
    }
    if isinstance(outcome, NotMeasured):
        return without_times(row, outcome.reason)
    with_times(row, outcome, 5)
    row.extra["gb_s"] = _gb_s(item, outcome, settings)
    row.extra["ratios"] = {
        f"time / {title}": ratio(outcome, outcomes.get(f"{name} "))
        for title, name in (("torch AdamW", TORCH_ADAMW), ("DeepSpeed AdamW", DEEPSPEED_ADAMW))
    }
    for name, key in ((COPY, "copy"), (IN_PLACE, "in-place")):
        limit = outcomes[f"{name} "]
        if isinstance(limit, Times):
            rate = 8 * settings.elements / limit.median / 1e6
            row.extra["ratios"][f"rate / {key} rate"] = round(row.extra["gb_s"] / rate, 3)
            row.extra.setdefault("limits", {"matrix_tflops": {}})[f"{key.replace('-', '_')}_gb_s"] = float(
                f"{rate:.4g}"
            )
    return row


def _gb_s(item: Pass, outcome: Times, settings: ElementwiseSettings) -> float:
    return float(f"{item.bytes_per_element * settings.elements / outcome.median / 1e6:.4g}")
