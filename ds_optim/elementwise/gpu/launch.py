"""Calls of the kernels. Each answers whether it could do the work; if not, nothing was touched.

A kernel is compiled at the first call with its dtypes, and never for a length, an offset, a rate or a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_optim.elementwise.gpu import kernels
from ds_optim.elementwise.momentum import BLOCK, Bfloat16, Flat, Int8, Stored
from ds_optim.elementwise.native.steps import AdamW, Weights
from ds_optim.elementwise.noise import NoiseKey

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Of the compiler."""
_LOADED = (torch.float32, torch.bfloat16, torch.float16)
_LANES = BLOCK // 8
_BYTES = 16
"""What a thread can move at once."""


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """What all kernels ask about where they work. key, counter: see ``tiles.rounding_bits``."""

    key: int = 0
    counter: int = 0
    n: int
    head: int = 0
    aligned: int


def sign_step(p: Flat, m: Flat | None, g: Flat, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g."""
    if not _is_weights(p) or not _is_momentum(m) or not _is_gradient(g):
        return False
    pointers = _data(p), _data(m), _scales(m), _data(g)
    return _launch(kernels.sign_step, (p, m, g), pointers, (*weights, lr, factor), rounded=(p, m))


def blend_into(out: Tensor, m: Flat | None, g: Flat, weights: Weights) -> bool:
    """out <- d0 m + d1 g; m <- k0 m + k1 g."""
    if out.dtype not in _LOADED or not _is_momentum(m) or not _is_gradient(g):
        return False
    pointers = _data(out), _data(m), _scales(m), _data(g)
    return _launch(kernels.blend_into, (out, m, g), pointers, weights, rounded=(m,))


def apply_update(p: Flat, update: Flat, rate: float, factor: float) -> bool:
    """p <- factor p - rate update."""
    if not _is_weights(p) or (isinstance(update, Tensor) and update.dtype not in (*_LOADED, torch.int8)):
        return False
    pointers = _data(p), _data(update), _scales(update)
    return _launch(kernels.apply_update, (p, update), pointers, (rate, factor), rounded=(p,))


def adamw_step(p: Flat, m: Tensor, v: Tensor, g: Flat, numbers: AdamW) -> bool:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g g; p <- factor p - rate m / (sqrt(v) / correction + eps)."""
    if not _is_weights(p) or not _is_gradient(g) or m.dtype != torch.float32 or v.dtype != torch.float32:
        return False
    return _launch(kernels.adamw_step, (p, m, v, g), [_data(x) for x in (p, m, v, g)], numbers, rounded=(p,))


def _launch(
    kernel: Any,
    tensors: Sequence[Flat | None],
    pointers: Sequence[Tensor | None],
    numbers: Sequence[float],
    *,
    rounded: Sequence[Flat | None],
) -> bool:
    """Call a kernel, if the tensors lie in step. rounded: those that it asks the step of, in its order."""
    place = _slice(*tensors)
    if place is None or pointers[0] is None:
        return False
    with _on(pointers[0].device):
        kernel[(-(-(place.head + place.n) // BLOCK),)](
            *pointers,
            *map(float, numbers),
            place.key,
            *map(_step, rounded),
            place.counter,
            place.n,
            place.head,
            place.aligned,
            **OPTIONS,
        )
    return True


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _slice(*tensors: Flat | None) -> _Slice | None:
    """Where the work lies; None where there is none, or the tensors do not lie in step on one device."""
    flat = [tensor for tensor in tensors if tensor is not None]
    data = [tensor if isinstance(tensor, Tensor) else tensor.data for tensor in flat]
    if data[0].numel() == 0 or any(one.device != data[0].device or not one.is_contiguous() for one in data):
        return None
    places = {replace(tensor.rounding, step=0) for tensor in flat if isinstance(tensor, Stored) and _in_blocks(tensor)}
    if len(places) > 1:
        return None
    rounding = places.pop() if places else _anywhere(data)
    head = rounding.start % BLOCK
    return _Slice(
        key=_signed((rounding.seed & 0xFFFFFFFF) | (~rounding.stream & 0xFFFFFFFF) << 32),
        counter=rounding.start // BLOCK * _LANES,
        n=data[0].numel(),
        head=head,
        aligned=int(_is_aligned(data, head)),
    )


def _anywhere(data: list[Tensor]) -> NoiseKey:
    """A place for tensors whose blocks nobody asks about: one where they are aligned, if there is any."""
    start = next((start for start in range(_BYTES) if _is_aligned(data, start)), 0)
    return NoiseKey(seed=0, stream=0, step=0, start=start)


def _is_aligned(data: list[Tensor], head: int) -> bool:
    """Whether whole tiles begin at multiples of what a thread moves at once."""
    return all((one.data_ptr() - head * one.element_size()) % _BYTES == 0 for one in data)


def _in_blocks(tensor: Stored) -> bool:
    """Whether it matters where the blocks of its parameter begin."""
    return tensor.writable or isinstance(tensor, Int8)


def _is_weights(p: Flat) -> bool:
    return p.dtype == torch.float32 if isinstance(p, Tensor) else isinstance(p, Bfloat16) and p.writable


def _is_momentum(m: Flat | None) -> bool:
    if isinstance(m, Stored):
        return isinstance(m, Bfloat16 | Int8) and m.writable
    return m is None or m.dtype == torch.float32


def _is_gradient(g: Flat) -> bool:
    return g.dtype == torch.float32 if isinstance(g, Tensor) else isinstance(g, Bfloat16)


def _data(values: Flat | None) -> Tensor | None:
    """The memory behind ``values``; a bfloat16's bits as int16."""
    if values is None:
        return None
    data = values if isinstance(values, Tensor) else values.data
    return data.view(torch.int16) if data.dtype == torch.bfloat16 else data


def _scales(values: Flat | None) -> Tensor | None:
    return values.scales if isinstance(values, Int8) else None


def _step(values: Flat | None) -> int:
    return _signed(values.rounding.step) if isinstance(values, Stored) else 0


def _signed(word: int) -> int:
    """The number with the same 64 bits that a signed integer can have."""
    return word - (1 << 64) if word >> 63 & 1 else word
