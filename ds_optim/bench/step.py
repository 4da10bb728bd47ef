"""Milliseconds of a training step and of the optimizer's step in it: ours, AdamW and DeepSpeed's own Muon, interleaved.

All engines of a stage live in the same processes and take turns, a few steps each, so that whatever else the machine
does meets all of them alike. Of each step the slowest rank counts, of the steps the median.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_optim.bench import engines, ranks
from ds_optim.bench.engines import ADAMW, DEEPSPEED_MUON, ModelShape, RunSettings
from ds_optim.bench.limits import Limits, measure_limits
from ds_optim.bench.timing import NotMeasured, Outcome, Times, ratio, with_times, without_times
from ds_optim.bench.trace import Overlap, traced
from ds_optim.matrix.polar import PolarSpec, cost
from ds_optim.optimizers import param_groups
from ds_optim.report.schema import Row

STEPS_A_TURN = 4  # timed ones, after one that finds cold caches: two periods of LionMuon
_TRACED_STEPS = 2  # one period
_LIMIT_BYTES, _LIMIT_SIZE, _LIMIT_SECONDS = 1 << 27, 1024, 1.0


@dataclass(frozen=True, kw_only=True)
class StepSettings(RunSettings):
    """What is run.

    tokens: a rank and step, in ``accumulation`` micro-batches. rounds: turns of ``STEPS_A_TURN`` timed steps, after one
    to warm up. traces: a folder that keeps the traces from which the overlap is read.
    """

    tokens: int = 64
    accumulation: int = 1
    rounds: int = 6
    traces: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """One rank's: seconds of each timed step by case, in all and in ``engine.step``; why a case has none; limits; of a
    few steps after those, how far matrix work covered the exchange's messages."""

    whole: Mapping[str, list[float]] = field(default_factory=dict)
    step: Mapping[str, list[float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None
    least_work: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    overlap: Mapping[str, Overlap] = field(default_factory=dict)


def rows(settings: StepSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each case and stage, as soon as its stage is measured."""
    for stage in settings.stages:
        try:
            by_rank: list[RankTimes] = ranks.run(settings.ranks, measure, stage, settings)
        except ranks.RankFailedError as problem:
            missing = RankTimes(missing=dict.fromkeys(settings.cases, str(problem)))
            by_rank = [missing] * settings.ranks
        yield from stage_rows(stage, by_rank, settings, stamp)


def measure(rank: int, world_size: int, stage: int, settings: StepSettings) -> RankTimes:
    """Time every case of a stage on this rank."""
    from ds_optim.machine import ranks as group

    torch.manual_seed(rank)
    built, missing = {}, {}
    for case in settings.cases:
        try:
            built[case] = group.together(lambda case=case: started(case, stage, settings))  # type: ignore[misc]
        except Exception as problem:  # what one optimizer lacks here must not cost the others their rows
            missing[case] = " ".join(str(problem).split())
    torch.distributed.barrier()
    # All ranks at once, as they step: on a CPU they share cores and memory.
    limits = measure_limits(
        group.device(), dtypes=("bf16",), sizes=(_LIMIT_SIZE,), copy_bytes=_LIMIT_BYTES, hold=_LIMIT_SECONDS
    )
    whole: dict[str, list[float]] = {case: [] for case in built}
    step: dict[str, list[float]] = {case: [] for case in built}
    for turn in range(settings.rounds + 1):
        for case, engine in built.items():
            timed = []
            for number in range(1 + STEPS_A_TURN):
                batch = engines.random_tokens(engine, settings.shape.vocabulary, settings.tokens)
                torch.distributed.barrier()
                times = engines.train_step(engine, batch)
                # The first turn warms up; an engine's first step of a turn finds cold caches.
                if turn and number:
                    timed.append(times)
            if timed:  # a sample is the mean of whole periods: LionMuon's steps are of two kinds, and have no median
                whole[case].append(statistics.mean(seconds for seconds, _ in timed))
                step[case].append(statistics.mean(seconds for _, seconds in timed))
    work = {case: least_work(case, settings.shape, world_size, group.device()) for case in built}
    overlap = {case: trace(engine, f"{case}-stage{stage}-rank{rank}", settings) for case, engine in built.items()}
    return RankTimes(whole=whole, step=step, missing=missing, limits=limits, least_work=work, overlap=overlap)


def trace(engine: Any, name: str, settings: StepSettings) -> Overlap:
    """The overlap of messages and matrix work in a few steps; their trace stays where traces are kept."""
    batches = [engines.random_tokens(engine, settings.shape.vocabulary, settings.tokens) for _ in range(_TRACED_STEPS)]
    torch.distributed.barrier()
    with tempfile.TemporaryDirectory() as scratch:
        path = (settings.traces or Path(scratch)) / f"{name.replace(':', '_')}.json.gz"
        return traced(lambda: [engines.train_step(engine, batch) for batch in batches], path)


def started(case: str, stage: int, settings: StepSettings) -> Any:
    """An engine that has made its first step, at which some optimizers find what they cannot do."""
    engine = engines.build(case, stage, settings.shape, settings.accumulation)
    engines.train_step(engine, engines.random_tokens(engine, settings.shape.vocabulary, settings.tokens))
    return engine


def least_work(case: str, shape: ModelShape, world_size: int, device: torch.device) -> tuple[float, float]:
    """(bytes, matrix operations) that no optimizer step of ``case`` does without, per rank, on average.

    Bytes: fp32 weights, gradient and momentum read, weights and momentum written, AdamW's second moment read and
    written too. Operations: Newton-Schulz of all matrices, dealt out evenly, a period's share of them.
    """
    with torch.device("meta"):
        model = engines.qwen3(shape)
    numel = sum(parameter.numel() for parameter in model.parameters())
    nbytes = (28 if case == ADAMW else 20) * numel / world_size
    if not case.endswith("Muon"):
        return nbytes, 0.0
    spec = PolarSpec().resolve(device)
    matrices = [p for group in param_groups(model) if group["role"] == "matrix" for p in group["params"]]
    period = int(engines.CASES[case]["params"].get("period", 1))
    return nbytes, sum(cost(p.shape[-2], p.shape[-1], spec) for p in matrices) / world_size / period


def stage_rows(stage: int, by_rank: list[RankTimes], settings: StepSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of one stage, in the order of the cases."""
    missing = by_rank[0].missing
    whole = {case: slowest([r.whole.get(case) for r in by_rank], missing.get(case)) for case in settings.cases}
    step = {case: slowest([r.step.get(case) for r in by_rank], missing.get(case)) for case in settings.cases}
    for case in settings.cases:
        row = Row(kind="step_time", optimizer=case, stage=stage, ranks=settings.ranks, dtype="bf16")
        row.extra = {
            "shape": str(settings.shape),
            "tokens": settings.tokens,
            "accumulation": settings.accumulation,
            "limits": by_rank[0].limits.record() if by_rank[0].limits else None,
            **stamp,
        }
        outcome, inside = whole[case], step[case]
        if isinstance(outcome, Times) and isinstance(inside, Times):
            with_times(row, outcome, 2)
            row.extra["optimizer_ms"] = round(inside.median, 2)
            row.extra["optimizer_quartiles_ms"] = [round(ms, 2) for ms in inside.quartiles]
            row.extra["ratios"] = {
                f"{what} / {other}": ratio(times[case], times.get(other))
                for what, times in (("step", whole), ("optimizer", step))
                for other in (ADAMW, DEEPSPEED_MUON)
            }
            floor = limit_ms(case, by_rank)
            row.extra["ratios"]["optimizer / limit"] = round(inside.median / floor, 2) if floor else None
            row.extra["ratios"][f"step at the limit / {ADAMW}"] = at_the_limit(case, by_rank, whole.get(ADAMW))
            row.extra["overlap"] = covered([r.overlap[case] for r in by_rank])
        elif isinstance(outcome, NotMeasured):
            without_times(row, outcome.reason)
        yield row


def covered(by_rank: list[Overlap]) -> float | None:
    """The share of the time that messages of the exchange flew in which the rank worked on matrices, over all ranks;
    None where none flew."""
    messages = sum(overlap.messages_ms for overlap in by_rank)
    return round(sum(overlap.covered_ms for overlap in by_rank) / messages, 3) if messages else None


def limit_ms(case: str, by_rank: list[RankTimes]) -> float | None:
    """What the least work takes at the rates that the ranks reached side by side."""
    floors = []
    for measured in by_rank:
        if measured.limits is None:
            return None
        nbytes, operations = measured.least_work[case]
        products = measured.limits.milliseconds("bf16", operations) if operations else 0.0
        floors.append(None if products is None else nbytes / measured.limits.copy_gb_s / 1e6 + products)
    known = [floor for floor in floors if floor]
    return statistics.mean(known) if known else None


def at_the_limit(case: str, by_rank: list[RankTimes], whole: Outcome | None) -> float | None:
    """The ratio to AdamW's whole step if the two differed by their least work alone."""
    if not isinstance(whole, Times):
        return None
    floor, reference = limit_ms(case, by_rank), limit_ms(ADAMW, by_rank)
    return None if floor is None or reference is None else round(1 + (floor - reference) / whole.median, 3)


def slowest(by_rank: list[list[float] | None], missing: str | None) -> Outcome:
    """Milliseconds of each step on the rank that took longest; or why there are none."""
    known = [seconds for seconds in by_rank if seconds is not None]
    if missing is not None or len(known) < len(by_rank):
        return NotMeasured(reason=missing or "a rank could not build its engine")
    return Times(samples=tuple(max(step) * 1e3 for step in zip(*known, strict=True)))
