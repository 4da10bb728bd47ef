"""What of a run's DeepSpeed config decides its results: a resumed run must agree in that, and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FILES = ("nvme_path", "buffer_count", "buffer_size", "pin_memory", "max_in_cpu", "fast_init")
_PIPELINE = ("pipeline", "pipeline_read", "pipeline_write")
#: Where files lie, how they are read, and what is said of a run; in the sections that are named, all of it.
_WITHOUT_RESULT = (
    *(("zero_optimization", "offload_optimizer", key) for key in (*_FILES, *_PIPELINE)),
    *(("zero_optimization", "offload_param", key) for key in _FILES),
    *((key,) for key in ("aio", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler")),
    *((key,) for key in ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers")),
)


def deciding(config: Any) -> Any:
    """The config without what cannot change a result; what is no object of settings as it is."""
    for path in _WITHOUT_RESULT:
        config = _without(config, path)
    return config


def _without(section: Any, path: tuple[str, ...]) -> Any:
    key, *rest = path
    if not isinstance(section, Mapping) or key not in section:
        return section
    left = {name: value for name, value in section.items() if name != key}
    return {**left, key: _without(section[key], tuple(rest))} if rest else left
