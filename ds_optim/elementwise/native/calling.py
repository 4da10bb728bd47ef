"""What every call of a compiled kernel needs: which tensors suit it, their addresses, and a part for each thread."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_uint64, c_void_p
from functools import cache
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ds_optim.elementwise.noise import NoiseKey

GRAIN = 1 << 16
"""Elements worth a thread of their own: about 20 microseconds of work."""
LEAST_CUT = 2 * GRAIN
"""Elements from which on several threads take a part each."""
# What a thread takes at a time. Two threads with a half of 2^26 elements each took 0.82 of AdamW's time for a sign
# step, with parts of 2^22 0.71, of 2^20 0.74, of 2^18 0.87: near each other they share what memory has open.
_MOST = 1 << 22


class Key(ctypes.Structure):
    """(seed, stream, step) of a parameter's noise, and the place of the first element in its parameter."""

    _fields_ = (("seed", c_uint64), ("stream", c_uint64), ("step", c_uint64), ("start", c_uint64))


class BlendWeights(ctypes.Structure):
    """direction = d0 m + d1 g; m <- k0 m + k1 g."""

    _fields_ = (("d0", c_float), ("d1", c_float), ("k0", c_float), ("k1", c_float))


def key_of(key: NoiseKey, begin: int) -> Key:
    """Of the element ``begin`` behind the first one."""
    return Key(key.seed, key.stream, key.step, key.start + begin)


def is_flat_cpu(tensor: Any) -> bool:
    """Whether it is a vector in a CPU's memory, without gaps, and its address that of its values, as they are: no
    subclass's, and not to be negated yet."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.dim() == 1
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether it is such a vector of fp32."""
    return is_flat_cpu(tensor) and tensor.dtype is torch.float32


def address(tensor: Tensor, begin: int = 0) -> c_void_p:
    """Of the element ``begin``."""
    return c_void_p(tensor.data_ptr() + begin * tensor.element_size())


def in_parts(numel: int, multiple: int, part: Callable[[int, int], None], head: int = 0) -> None:
    """Call ``part(begin, count)`` on torch's threads, for parts that begin at ``head`` + multiples of ``multiple``."""
    threads = min(torch.get_num_threads(), numel // GRAIN)
    if threads < 2:
        part(0, numel)
        return
    width = width_of(numel, threads, multiple)
    edges = [0, *range(head + width, numel, width), numel]
    jobs = [pool(threads, os.getpid()).submit(part, a, b - a) for a, b in pairwise(edges)]
    for job in jobs:
        job.result()


def width_of(numel: int, threads: int, multiple: int) -> int:
    """Elements that a thread takes at a time."""
    return -(-min(numel, threads * _MOST) // (threads * multiple)) * multiple


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """ctypes lets go of the interpreter during a call, so that Python's threads work side by side.

    One for each process: a forked one has the parent's pool, and none of its threads.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="ds_optim")
