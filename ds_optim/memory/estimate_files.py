"""What ZeRO-3 writes to files where optimizer state is offloaded to NVMe, and the buffers that it reads them into.

Read in DeepSpeed 0.19.8 and held against the files that it wrote (tests/distributed/test_nvme.py). A sub-group below
1 MiB stays in the host's memory, and so does a gradient's slice, or the end of one that fills no whole KiB.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.sharding.layout import Unit

LEAST_BYTES = 1 << 20
_FP32 = 4
_ALIGNED = 1024 // _FP32
"""Elements; DeepSpeed multiplies them by ``aio.intra_op_parallelism``, 1 if nothing is said."""


def in_files(unit: Unit, zero: ZeroSettings) -> bool:
    """Whether the partitions of a sub-group lie in files between steps."""
    return zero.nvme and unit.partition_numel * _FP32 >= LEAST_BYTES


def stored_numel(unit: Unit, zero: ZeroSettings) -> int:
    """Elements that a buffer of a partition takes, those included that only fill a file's last KiB."""
    return _aligned(unit.partition_numel) if in_files(unit, zero) else unit.partition_numel


def gradient_files(units: Sequence[Unit], rank: int, zero: ZeroSettings) -> int:
    """Bytes of a rank's gradients in files, where they stay from a backward to the next."""
    found = 0
    for unit in (unit for unit in units if in_files(unit, zero)):
        for param, spec in enumerate(unit.params):
            shard = -(-spec.numel // unit.world_size)
            if unit.slice_of(param, rank) is not None and shard * _FP32 >= LEAST_BYTES:
                found += shard // _ALIGNED * _ALIGNED * _FP32
    return found


def pinned(units: Sequence[Unit], zero: ZeroSettings) -> int:
    """Bytes of the buffers that files are read into: each as long as the largest sub-group's partition."""
    if not zero.nvme:
        return 0
    return zero.swap_buffers * _aligned(max((unit.partition_numel for unit in units), default=0)) * _FP32


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNED) * _ALIGNED
