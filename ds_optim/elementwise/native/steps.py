"""Calls of the compiled kernels. Each answers whether it could do the work; if not, nothing was touched."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor

from ds_optim.elementwise.momentum import BLOCK, Bfloat16, Flat, Int8, Rounding, Stored
from ds_optim.elementwise.native.library import library

_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}
# Elements worth a thread of their own: about 20 microseconds of work. A multiple of a block.
_GRAIN = 1 << 16


class _Key(ctypes.Structure):
    _fields_ = (("seed", c_uint64), ("stream", c_uint64), ("step", c_uint64), ("start", c_uint64))


class _Array(ctypes.Structure):
    _fields_ = (("kind", c_int), ("values", c_void_p), ("scales", c_void_p), ("key", _Key))


class _Blend(ctypes.Structure):
    _fields_ = (("d0", c_float), ("d1", c_float), ("k0", c_float), ("k1", c_float))


class _Adam(ctypes.Structure):
    _fields_ = tuple(
        (name, c_float) for name in ("b1", "one_less_b1", "b2", "one_less_b2", "rate", "correction", "eps", "factor")
    )


Weights = tuple[float, float, float, float]
"""(d0, d1, k0, k1): direction d0 m + d1 g, next momentum k0 m + k1 g."""


def sign_step(p: Flat, m: Flat | None, g: Flat, weights: Weights, lr: float, factor: float) -> bool:
    """p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g."""
    lib = library()
    if lib is None or not _real(p) or not _real(g) or not _known(m) or not _cut_alike(p, m):
        return False
    blend = _Blend(*weights)

    def part(begin: int, count: int) -> None:
        arrays = (_array(tensor, begin) for tensor in (p, m, g))
        lib.ds_optim_sign_step(c_int64(count), *arrays, blend, c_float(lr), c_float(factor))

    _in_parts(p.numel(), (p, m), part)
    return True


def blend_into(out: Tensor, m: Flat | None, g: Flat, weights: Weights) -> bool:
    """out <- d0 m + d1 g; m <- k0 m + k1 g."""
    lib = library()
    if lib is None or not _real(g) or not _known(m) or not _is_flat_cpu(out) or out.dtype not in _KINDS:
        return False
    if out.dtype == torch.int8 or out.data_ptr() == _data(g).data_ptr():
        return False
    blend = _Blend(*weights)
    writable = c_int(m.writable if isinstance(m, Stored) else 1)

    def part(begin: int, count: int) -> None:
        arrays = (_array(tensor, begin) for tensor in (out, m, g))
        lib.ds_optim_blend_into(c_int64(count), *arrays, blend, writable)

    _in_parts(g.numel(), (m,), part)
    return True


def apply_update(p: Flat, update: Flat, rate: float, factor: float) -> bool:
    """p <- factor p - rate update."""
    lib = library()
    if lib is None or not _real(p) or isinstance(update, Int8):
        return False
    values = _data(update)
    if not _is_flat_cpu(values) or values.dtype not in _KINDS:
        return False

    def part(begin: int, count: int) -> None:
        arrays = _array(p, begin), _array(values, begin)
        lib.ds_optim_apply_update(c_int64(count), *arrays, c_float(rate), c_float(factor))

    _in_parts(p.numel(), (p,), part)
    return True


def adamw_step(p: Flat, m: Tensor, v: Tensor, g: Flat, numbers: tuple[float, ...]) -> bool:
    """As ``steps.adamw_step``. numbers: b1, 1 - b1, b2, 1 - b2, rate, correction, eps, factor."""
    lib = library()
    if lib is None or not _real(p) or not _real(g) or not _plain(m) or not _plain(v):
        return False
    adam = _Adam(*numbers)

    def part(begin: int, count: int) -> None:
        lib.ds_optim_adamw_step(c_int64(count), *(_array(tensor, begin) for tensor in (p, m, v, g)), adam)

    _in_parts(p.numel(), (p,), part)
    return True


def load(m: Stored, position: int, out: Tensor) -> bool:
    """out <- the values of ``m`` at [position, position + k)."""
    lib = library()
    if lib is None or not _plain(out) or not _known(m):
        return False
    lib.ds_optim_load(c_int64(out.numel()), _array(m, position), _at(out, 0))
    return True


def store(m: Stored, position: int, values: Tensor) -> bool:
    """Round ``values`` (k,) to [position, position + k) of ``m``."""
    lib = library()
    if lib is None or not _plain(values) or not _known(m):
        return False
    lib.ds_optim_store(c_int64(values.numel()), _array(m, position), _at(values, 0))
    return True


def uniform_noise(out: Tensor, *, seed: int, stream: int, step: int, start: int) -> bool:
    """As ``noise.uniform_noise``."""
    lib = library()
    if lib is None or not _plain(out):
        return False
    lib.ds_optim_uniform_noise(c_int64(out.numel()), _at(out, 0), _Key(seed, stream, step, start))
    return True


def square_sum(values: Tensor) -> float | None:
    """The sum of squares in fp64; None where the kernels do not know the tensor."""
    lib = library()
    if lib is None or not _plain(values) or values.dim() != 1:
        return None
    lib.ds_optim_square_sum.restype = c_double
    return float(lib.ds_optim_square_sum(c_int64(values.numel()), _at(values, 0)))


def _is_flat_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _plain(tensor: Flat) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and _is_flat_cpu(tensor) and tensor.dtype == torch.float32


def _real(tensor: Flat) -> bool:
    """Whether these are weights or a gradient that the kernels know: fp32, or stored in bfloat16."""
    return _plain(tensor) or (isinstance(tensor, Bfloat16) and _is_flat_cpu(tensor.values))


def _known(m: Flat | None) -> bool:
    if isinstance(m, Stored):
        return isinstance(m, Bfloat16 | Int8) and _is_flat_cpu(m.data)
    return m is None or _plain(m)


def _cut_alike(p: Flat, m: Flat | None) -> bool:
    """Whether one walk through blocks does for both: they are one slice of one parameter."""
    return not (isinstance(p, Stored) and isinstance(m, Stored)) or p.rounding.start == m.rounding.start


def _data(tensor: Flat) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.data


def _at(tensor: Tensor, begin: int) -> c_void_p:
    return c_void_p(tensor.data_ptr() + begin * tensor.element_size())


def _array(tensor: Flat | None, begin: int) -> _Array:
    """The part of a tensor that starts at its element ``begin``."""
    if tensor is None:
        return _Array(0, None, None, _Key(0, 0, 0, 0))
    if isinstance(tensor, Tensor):
        return _Array(_KINDS[tensor.dtype], _at(tensor, begin), None, _Key(0, 0, 0, 0))
    scales = None
    if isinstance(tensor, Int8):
        block = (tensor.rounding.start + begin) // BLOCK - tensor.rounding.start // BLOCK
        scales = _at(tensor.scales, block)
    return _Array(_KINDS[tensor.data.dtype], _at(tensor.data, begin), scales, _key(tensor.rounding, begin))


def _key(rounding: Rounding, begin: int) -> _Key:
    return _Key(rounding.seed, rounding.stream, rounding.step, rounding.start + begin)


def _in_parts(numel: int, rounded: tuple[Flat | None, ...], part: Callable[[int, int], None]) -> None:
    """Deal tensors out to torch's threads, cut where no block of those that are rounded is."""
    threads = min(torch.get_num_threads(), numel // _GRAIN)
    if threads < 2:
        part(0, numel)
        return
    head = next((-tensor.rounding.start % BLOCK for tensor in rounded if isinstance(tensor, Stored)), 0)
    width = -(-numel // (threads * BLOCK)) * BLOCK
    edges = [0, *range(head + width, numel, width), numel]
    jobs = [_pool(threads, os.getpid()).submit(part, a, b - a) for a, b in pairwise(edges)]
    for job in jobs:
        job.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """ctypes lets go of the interpreter during a call, so that Python's threads work side by side.

    One for each process: a forked one has the parent's pool, and none of its threads.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="ds_optim")
