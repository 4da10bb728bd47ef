"""Peak of live tensor bytes over a stretch of code, for accelerators that keep no count (the CPU).

A dispatch mode sees each tensor that an operator returns; a weak reference to its storage says when it is freed.
What it counts are tensor storages: weights, states, activations, gradients, communication buffers. What it cannot
see is an operator's own scratch (a matrix product's workspace), what a compiled function allocates inside, and what
an allocator keeps back: it is less than resident memory, and unlike it repeatable.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered.

    Attributes:
        base_bytes: tensors alive when it was entered.
        live_bytes: alive now.
        peak_bytes: the most that was alive at once since it was entered.

    Each storage counts once, whatever views share it. One device type is counted; tensors elsewhere are left out.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.device_type = device_type
        self.base_bytes = self.live_bytes = self.peak_bytes = 0
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> TensorTracker:
        self._add(self._alive())
        self.base_bytes = self.peak_bytes = self.live_bytes
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._watched.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def _alive(self) -> Iterable[torch.Tensor]:
        return live_tensors()

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                continue
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # sparse tensors have several
                continue
            # A compiler traces with fake tensors: they name this device, but their storage is on none.
            if storage.device.type != self.device_type:
                continue
            key, size = storage._cdata, storage.nbytes()
            if size == 0 or key in self._watched:
                continue
            # The callback runs when the last tensor on this storage goes, and only then may `key` be used again.
            self._watched[key] = weakref.ref(storage, partial(self._forget, key, size))
            self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size: int, _: object) -> None:
        if self._watched.pop(key, None) is not None:
            self.live_bytes -= size


def live_tensors() -> list[torch.Tensor]:
    """Tensors that Python can reach now. Those that autograd alone holds are not among them: call it between steps."""
    found = []
    for thing in gc.get_objects():
        try:
            if issubclass(type(thing), torch.Tensor):
                found.append(thing)
        except ReferenceError:  # a dead weak proxy
            continue
    return found
