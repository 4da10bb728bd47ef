"""What a rank's device holds now and held at most, as its allocator or a count of live tensors says."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    On the accelerator that DeepSpeed computes on, torch's allocator keeps count, which costs nothing. On the CPU, be
    there a GPU beside it or not, nothing does: live tensor storages are counted, which slows steps down: leave them out
    of timings.
    """

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        self._accelerator: Any = get_accelerator()
        name = self._accelerator.device_name()
        self._tracker = TensorTracker() if name == "cpu" else None
        self.kind = "live tensors" if name == "cpu" else f"the {name.upper()} allocator"

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
            self._accelerator.reset_peak_memory_stats()

    def held(self) -> int:
        """Bytes of live tensors now."""
        return int(self._accelerator.memory_allocated()) if self._tracker is None else self._tracker.live_bytes

    def peak(self) -> Peak:
        """The most since the last ``reset``."""
        if self._tracker is not None:
            return Peak(allocated=self._tracker.peak_bytes)
        device = self._accelerator
        statistics = device.memory_stats()
        return Peak(
            allocated=int(device.max_memory_allocated()),
            active=int(statistics.get("active_bytes.all.peak", 0)),
            reserved=int(device.max_memory_reserved()),
            outside=device_used_bytes(device) - int(device.memory_reserved()),
        )


def device_used_bytes(accelerator: Any) -> int:
    """Bytes in use on this rank's device, by all processes: as NVML counts them, or else the driver.

    ``accelerator``: DeepSpeed's, none of the CPU.
    """
    if accelerator.device_name() == "cuda":
        with suppress(ImportError, RuntimeError, AttributeError):  # no NVML bindings here
            return int(torch.cuda.device_memory_used())
    return int(accelerator.total_memory() - accelerator.available_memory())


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
