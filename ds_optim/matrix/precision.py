"""Products of fp32 matrices in fp32, whatever the program that trains allows its model.

``torch.set_float32_matmul_precision("high")``, ``allow_tf32`` and ``fp32_precision`` let a GPU multiply in TF32, of 11
bits, and a CPU in bfloat16. They are the process's: what is set here is set back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WHOLE = ("none", "ieee")
"""Neither shortens anything; "none" is what nobody has set."""


@contextmanager
def whole_fp32(device: torch.device) -> Iterator[None]:
    """In it products of fp32 tensors on ``device`` are in fp32; after it, or an exception, the setting is as before."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    # Asked and set by one of torch's two ways: to ask by the other in between would be an error.
    before = backend.fp32_precision
    if before in _WHOLE:
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
