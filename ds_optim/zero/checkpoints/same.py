"""Whether two contents of checkpoints are the same, tensors and arrays bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def same(one: Any, other: Any) -> bool:
    """Whatever the two hold: containers, tensors, arrays, and plain objects such as DeepSpeed's loss scalers."""
    import numpy as np

    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and identical(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()  # a NaN is a NaN
    return bool(one == other) or (hasattr(one, "__dict__") and bool(vars(one)) and same(vars(one), vars(other)))


def identical(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
