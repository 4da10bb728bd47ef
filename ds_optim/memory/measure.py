"""What a rank's device holds now and held at most, as its allocator or a count of live tensors says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ds_optim.memory.tracker import TensorTracker


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most at once over a stretch, in bytes.

    Attributes:
        allocated: of live tensors.
        active: of blocks that are allocated or wait for a stream; None on the CPU.
        reserved: of what torch's allocator took from the device; ``reserved - allocated`` is fragmentation and cache.
            None on the CPU.
        outside: at the end of the stretch, what is used on the device beyond ``reserved``: CUDA contexts, NCCL, other
            processes; None where the driver was not asked.
    """

    allocated: int
    active: int | None = None
    reserved: int | None = None
    outside: int | None = None


class MemoryWatch:
    """Bytes of this rank's device while it is entered: now (``held``) and at most since ``reset`` (``peak``).

    On CUDA the allocator keeps count, which costs nothing. On the CPU, where nothing does, live tensor storages are
    counted, which slows steps down: leave them out of timings.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._tracker = None if self._cuda else TensorTracker()
        self.kind = "the CUDA allocator" if self._cuda else "live tensors"

    def __enter__(self) -> MemoryWatch:
        if self._tracker is not None:
            self._tracker.__enter__()
        self.reset()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*exc_info)

    def reset(self) -> None:
        """Begin a new stretch: what is held now is its peak so far."""
        if self._tracker is not None:
            self._tracker.peak_bytes = self._tracker.live_bytes
        else:
            torch.cuda.reset_peak_memory_stats()

    def held(self) -> int:
        """Bytes of live tensors now."""
        return int(torch.cuda.memory_allocated()) if self._tracker is None else self._tracker.live_bytes

    def peak(self) -> Peak:
        """The most since the last ``reset``."""
        if self._tracker is not None:
            return Peak(allocated=self._tracker.peak_bytes)
        statistics = torch.cuda.memory_stats()
        return Peak(
            allocated=int(torch.cuda.max_memory_allocated()),
            active=int(statistics.get("active_bytes.all.peak", 0)),
            reserved=int(torch.cuda.max_memory_reserved()),
            outside=device_used_bytes() - int(torch.cuda.memory_reserved()),
        )


def device_used_bytes() -> int:
    """Bytes in use on this rank's CUDA device, by all processes: as NVML counts them, or else the driver."""
    try:
        return int(torch.cuda.device_memory_used())
    except (ImportError, RuntimeError, AttributeError):  # no NVML bindings here
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """This process's resident memory now, libraries included (Linux ``VmRSS``); None where the system keeps none."""
    return _status_bytes("VmRSS:", status)


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Its peak so far (Linux ``VmHWM``)."""
    return _status_bytes("VmHWM:", status)


def _status_bytes(key: str, status: Path) -> int | None:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)
