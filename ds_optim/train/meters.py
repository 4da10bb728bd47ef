"""Numbers of a step that the log keeps, read from the engine, the clock and the process."""

from __future__ import annotations

import time
from typing import Any


def skipped_steps(engine: Any) -> int:
    """Steps that DeepSpeed skipped, or at stage 0, where it skips none in fp32, our optimizer."""
    return int(engine.skipped_steps) + int(getattr(engine.basic_optimizer, "skipped_steps", 0))


def grad_norm(engine: Any) -> float | None:
    """The norm of the step's gradient before clipping, where this stage keeps one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def now() -> float:
    """A clock in seconds that waits for the device."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """This rank's peak in bytes: of the allocator, or of the resident set where there is none."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    import resource
    import sys

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
