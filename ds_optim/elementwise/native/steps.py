"""Calls of the compiled kernels. Each answers whether it could do the work; if not, nothing was touched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import BLOCK, Bfloat16, Flat, Int8, Stored
from ds_optim.elementwise.native.calling import (
    LEAST_CUT,
    BlendWeights,
    Key,
    address,
    in_parts,
    is_flat_cpu,
    is_plain,
    key_of,
)
from ds_optim.elementwise.native.library import library

_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}


class _Array(ctypes.Structure):
    _fields_ = (("kind", c_int), ("values", c_void_p), ("scales", c_void_p), ("key", Key))


class Adam(ctypes.Structure):
    _fields_ = tuple(
        (name, c_float) for name in ("b1", "one_less_b1", "b2", "one_less_b2", "eps", "correction", "rate", "factor")
    )


Weights = tuple[float, float, float, float]
"""(d0, d1, k0, k1): direction d0 m + d1 g, next momentum k0 m + k1 g."""
AdamW = tuple[float, float, float, float, float, float, float, float]
"""(b1, 1 - b1, b2, 1 - b2, eps, correction, rate, factor): see ``steps.adamw_step``."""


def sign_step(p: Flat, m: Flat | None, g: Flat, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g."""
    lib = library()
    if lib is None or not real(p, g) or not known(m) or not _cut_alike(p, m):
        return False
    blend = BlendWeights(*weights)

    def part(begin: int, count: int) -> None:
        arrays = (array(tensor, begin) for tensor in (p, m, g))
        lib.ds_optim_sign_step(c_int64(count), *arrays, blend, c_float(lr), c_float(factor))

    _in_parts(p.numel(), (p, m), part)
    return True


def blend_into(out: Tensor, m: Flat | None, g: Flat, weights: Weights) -> bool:
    """out <- d0 m + d1 g; m <- k0 m + k1 g."""
    lib = library()
    if lib is None or not real(g) or not known(m) or not takes_blends(out):
        return False
    if out.data_ptr() == _data(g).data_ptr():
        return False
    blend = BlendWeights(*weights)
    writable = c_int(m.writable if isinstance(m, Stored) else 1)

    def part(begin: int, count: int) -> None:
        arrays = (array(tensor, begin) for tensor in (out, m, g))
        lib.ds_optim_blend_into(c_int64(count), *arrays, blend, writable)

    _in_parts(g.numel(), (m,), part)
    return True


def apply_update(p: Flat, update: Flat, rate: float, factor: float) -> bool:
    """p <- factor p - rate update."""
    lib = library()
    if lib is None or not real(p) or isinstance(update, Int8):
        return False
    values = _data(update)
    if not is_update(values):
        return False

    def part(begin: int, count: int) -> None:
        arrays = array(p, begin), array(values, begin)
        lib.ds_optim_apply_update(c_int64(count), *arrays, c_float(rate), c_float(factor))

    _in_parts(p.numel(), (p,), part)
    return True


def adamw_step(p: Flat, m: Tensor, v: Tensor, g: Flat, numbers: AdamW) -> bool:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g g; p <- factor p - rate m / (sqrt(v) / correction + eps)."""
    lib = library()
    if lib is None or not real(p, g) or not is_plain(m) or not is_plain(v):
        return False
    adam = Adam(*numbers)

    def part(begin: int, count: int) -> None:
        lib.ds_optim_adamw_step(c_int64(count), *(array(tensor, begin) for tensor in (p, m, v, g)), adam)

    _in_parts(p.numel(), (p,), part)
    return True


def load(m: Stored, position: int, out: Tensor) -> bool:
    """out <- the values of ``m`` at [position, position + k)."""
    lib = library()
    if lib is None or not is_plain(out) or not known(m):
        return False
    lib.ds_optim_load(c_int64(out.numel()), array(m, position), address(out))
    return True


def store(m: Stored, position: int, values: Tensor) -> bool:
    """Round ``values`` (k,) to [position, position + k) of ``m``."""
    lib = library()
    if lib is None or not is_plain(values) or not known(m):
        return False
    lib.ds_optim_store(c_int64(values.numel()), array(m, position), address(values))
    return True


def real(*tensors: Flat) -> bool:
    """Whether these are weights and gradients that the kernels know: fp32, or stored in bfloat16."""
    return all(is_plain(one) or (isinstance(one, Bfloat16) and is_flat_cpu(one.values)) for one in tensors)


def known(m: Flat | None) -> bool:
    """Whether it is momentum that the kernels know."""
    if isinstance(m, Stored):
        return isinstance(m, Bfloat16 | Int8) and is_flat_cpu(m.data)
    return m is None or is_plain(m)


def takes_blends(out: Tensor) -> bool:
    """Whether it is fp32 or bfloat16, for directions."""
    return is_flat_cpu(out) and out.dtype in _KINDS and out.dtype != torch.int8


def is_update(values: Tensor) -> bool:
    return is_flat_cpu(values) and values.dtype in _KINDS


def _cut_alike(p: Flat, m: Flat | None) -> bool:
    """Whether one walk through blocks does for both: they are one slice of one parameter."""
    return not (isinstance(p, Stored) and isinstance(m, Stored)) or p.rounding.start == m.rounding.start


def _data(tensor: Flat) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.data


_NO_KEY = Key(0, 0, 0, 0)
_NO_ARRAY = _Array(0, None, None, _NO_KEY)


def array(tensor: Flat | None, begin: int = 0) -> _Array:
    """The part of a tensor that starts at its element ``begin``."""
    if tensor is None:
        return _NO_ARRAY
    if type(tensor) is not Tensor and isinstance(tensor, Stored):
        return _stored(tensor, begin)
    place = tensor.data_ptr() + begin * tensor.element_size() if begin else tensor.data_ptr()
    return _Array(_KINDS[tensor.dtype], place, None, _NO_KEY)


def _stored(tensor: Stored, begin: int) -> _Array:
    scales = None
    if isinstance(tensor, Int8):
        block = (tensor.rounding.start + begin) // BLOCK - tensor.rounding.start // BLOCK
        scales = address(tensor.scales, block)
    return _Array(_KINDS[tensor.data.dtype], address(tensor.data, begin), scales, key_of(tensor.rounding, begin))


def _in_parts(numel: int, rounded: tuple[Flat | None, ...], part: Callable[[int, int], None]) -> None:
    """Deal tensors out to torch's threads, cut where no block of those that are rounded is."""
    if numel < LEAST_CUT:
        part(0, numel)
        return
    head = next((-tensor.rounding.start % BLOCK for tensor in rounded if isinstance(tensor, Stored)), 0)
    in_parts(numel, BLOCK, part, head)
