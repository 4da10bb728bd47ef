"""Slices to be stepped or measured, and the launches for them: one a rule and its dtypes, however many slices.

A kernel is compiled at the first call with its dtypes, and never for a length, an offset, a rate or a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ds_optim.elementwise.gpu import kernels
from ds_optim.elementwise.gpu.rules import CAUTIOUS, RULES, Rule
from ds_optim.elementwise.momentum import BLOCK, Bfloat16, Flat, Int8, Stored
from ds_optim.elementwise.native.rules import MomentWeights
from ds_optim.elementwise.noise import NoiseKey

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Of the compiler."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16, torch.int8: tl.int8}
"""Of pointers; a bfloat16's bits are read as int16."""
_IDENTITY = {"sum": 0.0, "min": float("inf"), "max": 0.0}
_PLACES = {letter: kernels.NAMES.index(letter) - 1 for letter in "pmvg"}
_LANES = BLOCK // 8
_BYTES = 16
"""What a thread can move at once."""

Kind = tuple[str, tuple[Any, ...], torch.device]
"""What makes slices go in one launch: the rule, the types of p, m, v and g, and the device."""


class Job(NamedTuple):
    """One slice that waits for its launch, for which ``start`` is called with all of its kind. words, numbers: its row
    of the table, without the place of its programs; tensors are held until then; found: where what it measures goes."""

    kind: Kind
    start: Callable[[Sequence[Job]], None]
    words: list[int]
    numbers: list[float]
    blocks: int
    tensors: Sequence[Flat | None]
    found: Tensor | None


_launched: set[Kind] = set()
"""Kinds that are known to compile."""


def take(
    name: str, tensors: Sequence[Flat | None], numbers: Sequence[Any], waiting: list[Job] | None,
    cautious: float | None = None,
) -> Tensor | bool:  # fmt: skip
    """Step or measure a slice, or let it wait for others: True, or the numbers that are measured, (columns,) or ().

    False, and nothing was touched, where the kernels do not know these tensors. What no launch has shown to compile
    does not wait, so that whoever calls can still do without. cautious: the rate of ``fused.cautiously``.
    """
    rule = RULES[name] if cautious is None else RULES.get(CAUTIOUS + name, RULES[name])
    job = _job(rule, tensors, numbers)
    if job is None:
        return False
    if cautious is not None and rule.cautious:
        job.numbers[kernels.NUMBERS - 1] = cautious
    enter(job, waiting)
    return True if job.found is None else job.found


def enter(job: Job, waiting: list[Job] | None) -> None:
    """Launch it, or let it wait for others."""
    if waiting is not None and job.kind in _launched:
        waiting.append(job)
    else:
        launch([job])
        _launched.add(job.kind)


def launch(jobs: Sequence[Job]) -> None:
    """One launch for all slices of a kind, in the order in which kinds came."""
    kinds: dict[Kind, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    for alike in kinds.values():
        alike[0].start(alike)


def _start_rule(jobs: Sequence[Job]) -> None:
    name, types, device = jobs[0].kind
    rule = RULES[name]
    each = kernels.EACH if rule.columns else 1
    ends = list(accumulate((-(-job.blocks // each) for job in jobs), initial=0))
    parts = torch.empty(ends[-1], rule.columns, dtype=torch.float64, device=device) if rule.columns else None
    _start(rule, types, jobs, ends, parts, device)


def _start(
    rule: Rule, types: tuple[Any, ...], jobs: Sequence[Job], ends: Sequence[int], parts: Tensor | None,
    device: torch.device,
) -> None:  # fmt: skip
    """ends: the programs of slices before, and of all."""
    with on(device):
        table = table_of(jobs, ends, device)
        if ends[-1]:
            kernels.run[(ends[-1],)](
                table, len(jobs), parts, **constants(rule, types), **OPTIONS
            )  # fmt: skip
        if parts is not None:
            joined = rule.columns, rule.join, _IDENTITY[rule.join]
            kernels.join_parts[(len(jobs),)](table, parts, *joined, **OPTIONS)


def constants(rule: Rule, types: tuple[Any, ...]) -> dict[str, Any]:
    """What ``kernels.run`` is compiled for."""
    return {
        "rule": rule.formula,
        "types": types,
        "writes": tuple(
            letter in rule.writes and type_ is not None for letter, type_ in zip("pmv", types, strict=False)
        ),
        "nearest": "p" in rule.casts,
        "noisy": rule.noisy,
        "cautious": rule.cautious,
        "columns": rule.columns,
        "join": rule.join,
        "identity": _IDENTITY[rule.join],
        "each": kernels.EACH if rule.columns else 1,
    }


def table_of(jobs: Sequence[Job], ends: Sequence[int], device: torch.device) -> Tensor:
    """(slices + 1, 1 + words + numbers) of int64, brought to ``device`` in one copy that nobody waits for."""
    words, width = 1 + len(jobs[0].words), 1 + len(jobs[0].words) + len(jobs[0].numbers)
    rows = torch.empty(len(ends), width, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    rows[:, 0] = torch.tensor(ends, dtype=torch.int64, device="cpu")
    rows[:-1, 1:words] = torch.tensor([job.words for job in jobs], dtype=torch.int64, device="cpu")
    numbers = torch.tensor([job.numbers for job in jobs], dtype=torch.float64, device="cpu")
    rows[:-1, words:] = numbers.view(torch.int64)
    return rows.to(device, non_blocking=True)


def on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _job(rule: Rule, tensors: Sequence[Flat | None], numbers: Sequence[Any]) -> Job | None:
    """None where the tensors do not lie in step on one device, or are none that the kernels know."""
    by_letter: dict[str, Flat | None] = dict.fromkeys("pmvg")
    by_letter.update(zip(rule.tensors, tensors, strict=True))
    if rule.casts == "g" and isinstance(
        by_letter["g"], Int8
    ):  # an update: read like momentum, which may be of that kind
        by_letter["m"], by_letter["g"] = by_letter["g"], None
    types: list[Any] = []
    words = [0] * (kernels.WORDS - 1)  # a row of the table from its second word on
    data: list[Tensor] = []
    places: list[tuple[int, int]] = []  # addresses, and bytes of an element there
    stored: list[NoiseKey] = []
    for letter, values in by_letter.items():
        type_ = None if values is None else _type(rule, letter, values)
        types.append(type_)
        if values is None:
            continue
        if type_ is None:
            return None
        if isinstance(values, Stored):
            one = values.data
            if isinstance(values, Int8):
                words[9] = address(values.scales)
                stored.append(values.rounding)
            elif letter in rule.writes:
                stored.append(values.rounding)
            if letter != "g":
                words[5 if letter == "p" else 6] = signed(values.rounding.step)
        else:
            one = values
        data.append(one)
        words[_PLACES[letter]] = place = address(one)
        places.append((place, one.element_size()))
    device, n = data[0].device, data[0].numel()
    if any(one.device != device or not one.is_contiguous() for one in data) or not _alike(stored):
        return None
    start = stored[0].start if stored else 0 if rule.columns else _aligned_start(places)
    head = start % BLOCK
    words[:3] = n, head, int(_is_aligned(places, head))
    if stored:
        words[3:5] = key_of(stored[0].seed, ~stored[0].stream), start // BLOCK * _LANES
    if rule.noisy:
        noise = numbers[-1]
        words[12:15] = key_of(noise.seed, noise.stream), signed(noise.step), noise.start
    found = None
    if rule.columns:
        found = torch.empty(rule.columns, dtype=torch.float64, device=device)
        words[15] = address(found)
        found = found if rule.columns > 1 else found[0]
    blocks = -(-(head + n) // BLOCK) if n else 0
    return Job((rule.name, tuple(types), device), _start_rule, words, _numbers(numbers), blocks, tensors, found)


def _numbers(given: Sequence[Any]) -> list[float]:
    found: list[float] = []
    for number in given:
        if isinstance(number, tuple):
            found.extend(number)
        elif isinstance(number, MomentWeights):
            found.extend(number.values)
        elif not isinstance(number, NoiseKey):
            found.append(number)
    return found + [0.0] * (kernels.NUMBERS - len(found))


def _type(rule: Rule, letter: str, values: Flat) -> Any:
    """Of the pointer to the values; None where the kernels do not know them."""
    if isinstance(values, Stored):
        if letter == "v" or (letter in rule.writes and not values.writable):
            return None
        known = isinstance(values, Bfloat16) or (isinstance(values, Int8) and letter == "m")
        return TYPES[values.data.dtype] if known else None
    if values.dtype == torch.float32:
        return tl.float32
    if letter not in rule.casts or (letter in rule.writes and values.dtype == torch.int8):
        return None
    return TYPES.get(values.dtype)


def _alike(stored: Sequence[NoiseKey]) -> bool:
    """Whether they are one slice of one parameter, whatever the step that each is rounded at."""
    return all(
        (one.seed, one.stream, one.start) == (stored[0].seed, stored[0].stream, stored[0].start) for one in stored[1:]
    )


def _aligned_start(places: Sequence[tuple[int, int]]) -> int:
    """A place for tensors whose blocks nobody asks about: one where they are aligned, if there is any."""
    return next((start for start in range(_BYTES) if _is_aligned(places, start)), 0)


def _is_aligned(places: Sequence[tuple[int, int]], head: int) -> bool:
    """Whether whole tiles begin at multiples of what a thread moves at once."""
    return all(not (address - head * size) % _BYTES for address, size in places)


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def key_of(seed: int, stream: int) -> int:
    return signed((seed & 0xFFFFFFFF) | (stream & 0xFFFFFFFF) << 32)


def signed(word: int) -> int:
    """The number with the same 64 bits that a signed integer can have."""
    return word - (1 << 64) if word >> 63 & 1 else word
