"""Times of cases that take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_optim.machine.child import reason_line
from ds_optim.report.schema import Row

#: A sample of less is repeated and divided: the clock and the launch of a kernel would be a part of it.
_SHORTEST_MS = 2.0
_MOST_REPEATS = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time. ``prepare`` runs before each sample and is not timed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of one call, a value for each sample; at least two."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """Why there is no time: one line."""

    reason: str


Outcome = Times | NotMeasured


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one of ``repeats`` calls: the wall's on a CPU, between two events of the stream on CUDA."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def take_turns(cases: Sequence[Case], device: torch.device, rounds: int) -> dict[str, Outcome]:
    """``rounds`` samples of each case, the cases one after the other in each round.

    Before, each runs twice: once to warm up, compile and fail, once to learn how often it must run for one sample.
    A case that fails has its last line as the reason.
    """
    outcomes: dict[str, Outcome] = {}
    repeats: dict[str, int] = {}
    for case in cases:
        try:
            case.prepare()
            elapsed_ms(case.run, device)
            case.prepare()
            once = elapsed_ms(case.run, device)
        except (RuntimeError, MemoryError, ImportError) as problem:
            outcomes[case.name] = NotMeasured(reason=reason_line(problem))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        repeats[case.name] = min(_MOST_REPEATS, max(1, math.ceil(_SHORTEST_MS / max(once, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for case in cases:
            if case.name in samples:
                case.prepare()
                samples[case.name].append(elapsed_ms(case.run, device, repeats[case.name]))
    outcomes |= {name: Times(samples=tuple(values)) for name, values in samples.items()}
    return {case.name: outcomes[case.name] for case in cases}


def take_turns_of(
    makers: Mapping[str, str | Callable[[], Case]], device: torch.device, rounds: int
) -> dict[str, Outcome]:
    """``take_turns`` of cases that are made here, by name; or the reason why one is left out."""
    outcomes: dict[str, Outcome] = {}
    cases = []
    for name, maker in makers.items():
        try:
            if isinstance(maker, str):
                outcomes[name] = NotMeasured(reason=maker)
            else:
                cases.append(maker())
        except (RuntimeError, MemoryError, ImportError) as problem:
            outcomes[name] = NotMeasured(reason=" ".join(str(problem).split())[:300])
    return outcomes | take_turns(cases, device, rounds)


def with_times(row: Row, times: Times, digits: int) -> Row:
    """``row`` with the median and the quartiles."""
    row.ms_per_step, row.ms_low, row.ms_high = (round(ms, digits) for ms in (times.median, *times.quartiles))
    return row


def without_times(row: Row, reason: str) -> Row:
    """``row``, which says why it has no numbers."""
    row.extra["not_measured"] = reason
    row.notes.append(f"not measured: {reason}")
    return row


def ratio(outcome: Outcome, reference: Outcome | None) -> float | None:
    """The medians' ratio; None where either was not measured."""
    if isinstance(outcome, Times) and isinstance(reference, Times):
        return round(outcome.median / reference.median, 3)
    return None
