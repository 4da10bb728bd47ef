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
from typing import Any

import torch
from torch import Tensor

from ds_optim.bench.fused_adamw import deepspeed_adamw, torch_adamw
from ds_optim.bench.timing import Case, NotMeasured, Outcome, Times, ratio, take_turns
from ds_optim.elementwise import fused, native
from ds_optim.elementwise.blend import Blend, blend_into
from ds_optim.elementwise.chunks import Scratch
from ds_optim.elementwise.momentum import BLOCK, WEIGHTS, Bfloat16, Int8, Rounding, Stored
from ds_optim.elementwise.native.library import library
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
class Pass:
    """One case: what it is, its path (ours have two), bytes per element, and what makes the call to time."""

    name: str
    what: str
    bytes_per_element: float
    made: Callable[[], Callable[[], object]]
    path: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.path}"


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The tensors that all cases share, (n,) each, fp32."""

    p: Tensor
    g: Tensor
    out: Tensor


def rows(settings: ElementwiseSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each case."""
    before = {switch: os.environ.get(switch) for switch in _SWITCHES}
    try:
        passes = list(all_passes(settings))
        outcomes = measure(passes, settings)
    finally:
        _use(before)
    for item in passes:
        yield to_row(item, outcomes, settings, stamp)


def all_passes(settings: ElementwiseSettings) -> Iterator[Pass]:
    """The cases; their tensors are made when the first is."""
    held: list[Flat] = []

    def flat() -> Flat:
        if not held:
            generator = torch.Generator(settings.device).manual_seed(0)
            p, g = (torch.empty(settings.elements, dtype=torch.float32, device=settings.device) for _ in range(2))
            p.normal_(0, 0.02, generator=generator)
            g.normal_(0, 1e-3, generator=generator)
            held.append(Flat(p=p, g=g, out=torch.empty_like(p)))
        return held[0]

    yield Pass(name=COPY, what="limits", bytes_per_element=8, made=lambda: _copy(flat()))
    yield Pass(name=IN_PLACE, what="limits", bytes_per_element=8, made=lambda: _in_place(flat()))
    yield Pass(
        name=TORCH_ADAMW,
        what="sign step",
        bytes_per_element=28,
        made=lambda: torch_adamw(flat().p, flat().g, lr=_LR, decay=_DECAY),
    )
    yield Pass(
        name=DEEPSPEED_ADAMW,
        what="sign step",
        bytes_per_element=28,
        made=lambda: deepspeed_adamw(flat().p, flat().g, lr=_LR, decay=_DECAY),
    )
    for path in (COMPILED, EAGER):
        for dtype, width in MOMENTUM_BYTES.items():
            yield Pass(
                name=f"sign step, {dtype} momentum",
                what="sign step",
                path=path,
                bytes_per_element=12 + 2 * width,
                made=lambda dtype=dtype: _sign_step(flat(), dtype),  # type: ignore[misc]
            )
        yield Pass(
            name=MASTERS,
            what="sign step",
            path=path,
            bytes_per_element=10,
            made=lambda: _masters_step(flat()),
        )
        yield Pass(name=ADAMW, what="sign step", path=path, bytes_per_element=28, made=lambda: _adamw(flat()))
    for what, make, others in (("blend into", _blend, 12), ("apply", _apply, 8)):
        for path in (COMPILED, EAGER):
            for dtype, width in (("float32", 4), ("bfloat16", 2)):
                yield Pass(
                    name=f"{what} {dtype}",
                    what=what,
                    path=path,
                    bytes_per_element=others + width,
                    made=lambda make=make, dtype=dtype: make(flat(), dtype),  # type: ignore[misc]
                )


def _copy(flat: Flat) -> Callable[[], object]:
    return lambda: flat.out.copy_(flat.g)


def _in_place(flat: Flat) -> Callable[[], object]:
    return lambda: flat.out.mul_(1.0)


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
    rounding = Rounding(seed=0, stream=1, step=WEIGHTS, start=0)
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
    rounding = Rounding(seed=0, stream=1, step=1, start=0)
    if dtype == "bfloat16":
        return Bfloat16(rounding=rounding, values=torch.zeros_like(like, dtype=torch.bfloat16))
    if dtype == "int8":
        scales = torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)
        return Int8(rounding=rounding, codes=torch.zeros_like(like, dtype=torch.int8), scales=scales)
    return torch.zeros_like(like)


def measure(passes: list[Pass], settings: ElementwiseSettings) -> dict[str, Outcome]:
    """Times by ``key``; the reason where a case was left out."""
    outcomes: dict[str, Outcome] = {}
    cases = []
    for item in passes:
        reason = settings.missing
        if reason is None and item.path == COMPILED:
            reason = no_compiled_path(settings.device)
        if reason is None:
            try:
                _choose(item.path)
                cases.append(Case(name=item.key, run=item.made(), prepare=_chooser(item.path)))
            except (RuntimeError, MemoryError, ImportError) as problem:
                reason = " ".join(str(problem).split())[:300]
        if reason is not None:
            outcomes[item.key] = NotMeasured(reason=reason)
    return outcomes | take_turns(cases, settings.device, settings.rounds)


def no_compiled_path(device: torch.device) -> str | None:
    """Why a step on ``device`` is not taken by the compiled kernels, if it is not."""
    _choose(COMPILED)
    p, m, g = (torch.zeros(BLOCK, dtype=torch.float32, device=device) for _ in range(3))
    arguments = p, m, g, (*LION.direction, *LION.momentum), 0.0, 1.0
    if native.sign_step(*arguments) or fused.sign_step(*arguments):
        return None
    missing = {"cpu": "no C compiler was found", "cuda": "Triton is missing, or cannot compile"}
    return missing.get(device.type, f"there are no compiled kernels for {device.type}")


def _chooser(path: str) -> Callable[[], None]:
    return lambda: _choose(path)


def _choose(path: str) -> None:
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
        row.extra["not_measured"] = outcome.reason
        row.notes.append(f"not measured: {outcome.reason}")
        return row
    low, high = outcome.quartiles
    row.ms_per_step, row.ms_low, row.ms_high = (round(ms, 5) for ms in (outcome.median, low, high))
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
