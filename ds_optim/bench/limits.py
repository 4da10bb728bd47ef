"""What the machine itself can do, measured in the run that is judged by it: copies and square matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ds_optim.bench.timing import elapsed_ms
from ds_optim.machine.child import reason_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIZES = (512, 1024, 2048, 4096)
#: Many times the last cache of a server's CPU socket, and of an accelerator.
COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}
_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates of one device, the best of a few samples each.

    Attributes:
        copy_gb_s: bytes read and bytes written of a copy within the device's memory, 1e9 a second. What a CPU reads
            in order to write (write-allocation) is not counted.
        matrix_tflops: by dtype, then by n: 2 n^3 operations of an n x n product, 1e12 a second.
        not_measured: by "dtype n", why there is no such rate.
    """

    copy_gb_s: float
    matrix_tflops: dict[str, dict[int, float]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def matrix_rate(self, dtype: str) -> float | None:
        """The best rate of ``dtype`` over all sizes, 1e12 operations a second; None where none was measured."""
        return max(self.matrix_tflops.get(dtype, {}).values(), default=None)

    def milliseconds(self, dtype: str, operations: float) -> float | None:
        """What so many operations take at the matrix rate of ``dtype``."""
        rate = self.matrix_rate(dtype)
        return None if rate is None else operations / rate / 1e9

    def record(self) -> dict[str, Any]:
        """As JSON, sizes as text, rates to four digits."""
        record = asdict(self)
        record["copy_gb_s"] = _digits(self.copy_gb_s)
        record["matrix_tflops"] = {
            dtype: {str(size): _digits(rate) for size, rate in rates.items()}
            for dtype, rates in self.matrix_tflops.items()
        }
        return record


def measure_limits(
    device: torch.device,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    sizes: Sequence[int] = MATRIX_SIZES,
    copy_bytes: int | None = None,
    seconds: float = 3.0,
    hold: float | None = None,
) -> Limits:
    """Measure ``device``. A product that would take longer than ``seconds`` for all its samples is left out.

    Args:
        copy_bytes: of the tensor that is copied; by default one that no cache holds.
        hold: seconds over which each rate is the mean, for ranks that share a machine and measure at the same time;
            None for the best sample, which nobody else slowed down.
    """
    rates: dict[str, dict[int, float]] = {}
    missing: dict[str, str] = {}
    for dtype in dtypes:
        found = rates[dtype] = {}
        for size in sorted(sizes):
            expected = 2.0 * size**3 / (list(found.values())[-1] * 1e12) * (_SAMPLES + 1) if found else 0.0
            if expected > seconds:
                missing[f"{dtype} {size}"] = f"would take about {expected:.0f} s"
                continue
            try:
                found[size] = matrix_tflops(device, DTYPES[dtype], size, hold)
            except RuntimeError as problem:
                missing[f"{dtype} {size}"] = reason_line(problem)
    copied = copy_gb_s(device, copy_bytes or COPY_BYTES[device.type], hold)
    return Limits(copy_gb_s=copied, matrix_tflops=rates, not_measured=missing)


def copy_gb_s(device: torch.device, nbytes: int, hold: float | None = None) -> float:
    """Bytes moved by copies of ``nbytes``, each read once and written once; 1e9 a second."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _call_ms(lambda: target.copy_(source), device, hold) / 1e6


def matrix_tflops(device: torch.device, dtype: torch.dtype, size: int, hold: float | None = None) -> float:
    """Operations of products of two (size, size) matrices, 1e12 a second."""
    left, right = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3 / _call_ms(lambda: torch.mm(left, right, out=out), device, hold) / 1e9


def _call_ms(run: Any, device: torch.device, hold: float | None) -> float:
    """Milliseconds of a call: of the best sample, or the mean over ``hold`` seconds of calls."""
    once = elapsed_ms(run, device)
    repeats = max(1, min(100, int(2.0 / max(once, 1e-3))))
    if hold is None:
        return max(min(elapsed_ms(run, device, repeats) for _ in range(_SAMPLES)), 1e-6)
    samples = [elapsed_ms(run, device, repeats)]
    while sum(samples) * repeats < hold * 1e3:
        samples.append(elapsed_ms(run, device, repeats))
    return max(sum(samples) / len(samples), 1e-6)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
