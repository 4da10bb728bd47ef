"""Milliseconds to orthogonalize one matrix: our schedules, methods and dtypes, and the routine of DeepSpeed's Muon.

The cases of a shape take turns. DeepSpeed's routine is the one that its Muon calls by default (Gram form, keller, five
steps, dtype of its own choice), on a bf16 matrix: compiled, as it ships, and eager, what it is inside.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

from ds_optim.bench.limits import DTYPES, MATRIX_SIZES, Limits, measure_limits
from ds_optim.bench.timing import Case, NotMeasured, Outcome, ratio, take_turns_of, with_times, without_times
from ds_optim.matrix.polar import PolarSpec, cost, polar
from ds_optim.report.schema import Row

SHAPES = ((768, 768), (768, 2304), (3072, 768), (2048, 8192), (4096, 4096), (4096, 16384))
MAX_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
METHODS = ("standard", "gram")
DEEPSPEED, DEEPSPEED_EAGER = "DeepSpeed", "DeepSpeed, eager"
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_BASES = (DEEPSPEED, DEEPSPEED_EAGER)
_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class PolarSettings:
    """What is measured. missing: why nothing can be. seconds: that a case may take, by the matrix rate."""

    device: torch.device
    shapes: tuple[tuple[int, int], ...]
    max_elements: int
    schedules: tuple[str, ...] = ("keller",)
    methods: tuple[str, ...] = METHODS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    rounds: int = 7
    seconds: float = 20.0
    compiled: bool = True
    missing: str | None = None
    matrix_sizes: tuple[int, ...] = MATRIX_SIZES
    copy_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One case of a shape.

    operations: that the iteration does. whole: that it would do with symmetric products in whole. made: builds what is
    timed, when it is to be.
    """

    name: str
    dtype: str
    operations: float
    whole: float
    made: Callable[[], Callable[[], object]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"


def rows(settings: PolarSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each case, shape by shape."""
    limits = None
    if settings.missing is None:
        limits = measure_limits(
            settings.device,
            sizes=settings.matrix_sizes,
            copy_bytes=settings.copy_bytes,
            dtypes=tuple(dict.fromkeys((*settings.dtypes, *deepspeed_dtypes(settings.device)))),
        )
    for m, n in settings.shapes:
        too_large = f"more than --max-elements {settings.max_elements}" if m * n > settings.max_elements else None
        reason = settings.missing or too_large
        if reason is not None:
            yield without_times(_row("every routine", (m, n), "", stamp), reason)
            continue
        jobs = [*own_jobs(m, n, settings), *deepspeed_jobs(m, n, settings)]
        outcomes = measure(jobs, settings, limits)
        for job in jobs:
            yield to_row(job, (m, n), outcomes, limits, stamp)
        random_matrix.cache_clear()


def own_jobs(m: int, n: int, settings: PolarSettings) -> Iterator[Job]:
    """Ours: every schedule, method and dtype that was asked for."""
    for dtype in settings.dtypes:
        for method in settings.methods:
            for name in settings.schedules:
                spec = PolarSpec(schedule=name, steps=_STEPS, method=method, dtype=NAMES[dtype])
                spec = spec.resolve(settings.device)
                auto = PolarSpec().resolve(settings.device).method_for(m, n)
                yield Job(
                    name=f"{name}, {method}",
                    dtype=dtype,
                    operations=cost(m, n, spec),
                    whole=cost(m, n, spec, whole=True),
                    made=partial(_own, m, n, spec, settings.device),
                    facts={"schedule": name, "method": method, "auto": method == auto, "strips": spec.strips_for(m, n)},
                )


def _own(m: int, n: int, spec: PolarSpec, device: torch.device) -> Callable[[], object]:
    x = random_matrix(m, n, device, spec.message_dtype).unsqueeze(0)
    return lambda: polar(x, spec)


def deepspeed_jobs(m: int, n: int, settings: PolarSettings) -> Iterator[Job]:
    """DeepSpeed's routine, eager and as it ships."""
    (dtype,) = deepspeed_dtypes(settings.device)
    method = "gram" if m != n else "standard"  # it takes the standard form for square matrices
    short, long = min(m, n), max(m, n)
    operations = 20.0 * short**2 * long + 10.0 * short**3
    if method == "gram":  # segments of 2 and 3 steps
        operations = 8.0 * short**2 * long + 28.0 * short**3
    for name, wanted in ((DEEPSPEED, settings.compiled), (DEEPSPEED_EAGER, True)):
        if wanted:
            yield Job(
                name=name,
                dtype=dtype,
                operations=operations,
                whole=operations,
                made=partial(_deepspeed, m, n, settings.device, eager=name == DEEPSPEED_EAGER),
                facts={"schedule": "keller", "method": method},
            )


def _deepspeed(m: int, n: int, device: torch.device, *, eager: bool) -> Callable[[], object]:
    routine = _deepspeed_module(device).zeropower_via_gram_newtonschulz
    if eager:
        routine = torch.compiler.disable(getattr(routine, "_torchdynamo_orig_callable", routine))
    x = random_matrix(m, n, device, torch.bfloat16)

    def run() -> object:
        with torch.no_grad():
            return routine(x, steps=_STEPS)

    return run


def deepspeed_dtypes(device: torch.device) -> tuple[str]:
    """The short name of the dtype that DeepSpeed's routine computes in on ``device``."""
    chosen = _deepspeed_module(device).ns_compute_dtype("gram")
    return (next(name for name, dtype in DTYPES.items() if dtype == chosen),)


def _deepspeed_module(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read once, when DeepSpeed is imported first
    from deepspeed.runtime.zero.muon import original_muon

    return original_muon


@lru_cache(maxsize=4)
def random_matrix(m: int, n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(m, n) of a normal distribution, the same in every run; the cases of a shape share one."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(m, n, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def measure(jobs: list[Job], settings: PolarSettings, limits: Limits | None) -> dict[str, Outcome]:
    """Times by ``key``; the reason where a case was left out."""
    makers = {job.key: too_slow(job, settings, limits) or partial(_case, job) for job in jobs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of what torch.compile still calls
        return take_turns_of(makers, settings.device, settings.rounds)


def _case(job: Job) -> Case:
    return Case(name=job.key, run=job.made())


def too_slow(job: Job, settings: PolarSettings, limits: Limits | None) -> str | None:
    """Why a case is left out that cannot be done in time even at the matrix rate, if it is one."""
    least = limits.milliseconds(job.dtype, job.operations) if limits else None
    if least is None:
        return None
    whole = least * (settings.rounds + 2) / 1e3
    reason = f"would take at least {whole:.0f} s, more than --seconds {settings.seconds:g}"
    return reason if whole > settings.seconds else None


def to_row(
    job: Job, shape: tuple[int, int], outcomes: Mapping[str, Outcome], limits: Limits | None, stamp: Mapping[str, Any]
) -> Row:
    """One case's row, with its ratios to the others of the same shape and to the machine."""
    outcome = outcomes[job.key]
    operations = {"operations": job.operations, "operations_as_whole": job.whole}
    facts = {**operations, "limits": limits.record() if limits else None, **job.facts, **stamp}
    row = _row(job.name, shape, job.dtype, facts)
    if isinstance(outcome, NotMeasured):
        return without_times(row, outcome.reason)
    row.extra["threads"] = torch.get_num_threads()
    with_times(row, outcome, 4)
    # Done, and as if symmetric products were done in whole, as in libraries that have no other.
    row.extra["tflops"] = float(f"{job.operations / outcome.median / 1e9:.4g}")
    row.extra["tflops_as_whole"] = float(f"{job.whole / outcome.median / 1e9:.4g}")
    references = {name: next((o for k, o in outcomes.items() if k.rsplit(" ", 1)[0] == name), None) for name in _BASES}
    row.extra["ratios"] = {f"time / {name}": ratio(outcome, reference) for name, reference in references.items()}
    rate = limits.matrix_rate(job.dtype) if limits else None
    row.extra["ratios"]["rate / matrix rate"] = round(row.extra["tflops"] / rate, 3) if rate else None
    return row


def _row(name: str, shape: tuple[int, int], dtype: str, facts: Mapping[str, Any]) -> Row:
    return Row(kind="polar", optimizer=name, dtype=dtype, extra={"shape": f"{shape[0]}x{shape[1]}", **facts})
