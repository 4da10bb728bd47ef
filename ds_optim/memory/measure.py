"""Peak memory of a rank over a stretch of training."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_optim.memory.tracker import TensorTracker


class PeakMemory:
    """The most memory held at once between ``start`` and ``stop``, in bytes.

    On CUDA it is the allocator's peak, which costs nothing. On the CPU, where nothing keeps count, it is the peak of
    live tensor storages, and counting them slows the steps down: leave those out of timings.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._tracker: TensorTracker | None = None
        self.peak_bytes: int | None = None
        self.reserved_bytes: int | None = None
        self.kind = "the CUDA allocator" if self._cuda else "live tensors"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._tracker = TensorTracker()
            self._tracker.__enter__()

    def stop(self) -> None:
        if self._cuda:
            self.peak_bytes = int(torch.cuda.max_memory_allocated())
            self.reserved_bytes = int(torch.cuda.max_memory_reserved())
        elif self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self.peak_bytes = self._tracker.peak_bytes


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """This process's peak resident memory, libraries included (Linux ``VmHWM``); None where the system keeps none."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
