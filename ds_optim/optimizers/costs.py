"""What a matrix costs on this machine: each shape is timed, so that owners get equal time and not equal counts.

One rank measures, all plan with its numbers. They are kept in checkpoints, so that a resumed run deals the matrices out
alike, and in the user's cache folder, so that the next one on the machine does:

    {"device": NAME, "jobs": {WHAT: {"768x2304": milliseconds of one matrix, ...}}}

A machine may be busy when it is asked: what is in the cache is timed again at the next two starts, and the smallest of
the three is what stays. Its file says for each shape [milliseconds, starts at which it was timed].
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.machine.cache import cache_folder, read_table, write_table
from ds_optim.matrix.dispatch import device_name
from ds_optim.matrix.shapes import Part
from ds_optim.sharding.plan import ExchangePlan

logger = logging.getLogger("ds_optim")

VERSION = 3  # 1: times of another Gram form; 2: of one start
Costs = dict[str, Any]
"""As above; plain, so that it can be saved."""
_Kept = tuple[float, int]
_SAMPLES = 3
_STARTS = 3
#: No matrix is done sooner; one that takes hours was never timed.
_LEAST_MS, _MOST_MS = 1e-6, 1e7
#: A first call that takes longer is the measurement.
_LONG_S = 0.5
#: All ranks wait: shapes that are left after so long are not timed.
_PATIENCE_S = 60.0
_WARM_UP = (64, 64)
_FILE = "costs.json"


def job_of(plan: ExchangePlan, device: torch.device) -> str:
    """The name that costs of a plan's matrices stand under; a CPU's depend on its threads."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{plan.shape.name}, {plan.polar}{threads}, torch {torch.__version__}"


def costs_of(plan: ExchangePlan, device: torch.device, costs: Costs) -> dict[tuple[int, int], float] | None:
    """Those of a plan's matrices; None where one of them was not measured, so that operations are counted for all."""
    found = costs["jobs"].get(job_of(plan, device), {})
    known = {size: found.get(_key(size)) for size in plan.sizes}
    return None if None in known.values() else known


def measured(plans: Iterable[ExchangePlan], device: torch.device, saved: Costs | None = None) -> Costs:
    """Costs of each plan's matrices: those of a checkpoint first, then those of the cache, then by the clock."""
    name = device_name(device)
    jobs: dict[str, dict[str, float]] = {}
    kept = _cached(name)
    fresh: dict[str, dict[str, _Kept]] = {}
    deadline = time.monotonic() + _PATIENCE_S
    for plan in plans:
        job = job_of(plan, device)
        own = jobs.setdefault(job, {})
        from_checkpoint = saved["jobs"].get(job, {}) if saved is not None and saved["device"] == name else {}
        warm = False
        for size in sorted(plan.sizes):
            key = _key(size)
            found = own.get(key) or from_checkpoint.get(key)
            if found is None:
                found, starts = kept.get(job, {}).get(key, (None, 0))
                if starts < _STARTS and time.monotonic() < deadline:
                    if not warm:  # libraries start up in their first call
                        _timed(plan, _WARM_UP, device)
                        warm = True
                    timed = _timed(plan, size, device)
                    if timed is not None:
                        found = timed if found is None else min(timed, found)
                        fresh.setdefault(job, {})[key] = found, starts + 1
            if found is not None:
                own[key] = found
            else:
                logger.warning("ds_optim: %s matrices were not timed: for theirs, operations are counted", key)
    if fresh:
        _keep(name, fresh)
    return {"device": name, "jobs": jobs}


def is_costs(value: Any) -> bool:
    """Whether a value that was read from somewhere is a table of costs."""
    if not isinstance(value, Mapping) or not isinstance(value.get("device"), str):
        return False
    jobs = value.get("jobs")
    return isinstance(jobs, Mapping) and all(
        isinstance(t, Mapping) and all(map(_is_cost, t.values())) for t in jobs.values()
    )


def _is_cost(value: Any) -> bool:
    """NaN and infinity are neither."""
    return type(value) in (int, float) and _LEAST_MS <= value <= _MOST_MS


def _is_kept(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_cost(value[0]) and type(value[1]) is int


def _timed(plan: ExchangePlan, size: tuple[int, int], device: torch.device) -> float | None:
    """Milliseconds of one matrix, the best of a few; None, and a line that says so, where it cannot be done."""
    generator = torch.Generator(device).manual_seed(0)  # not the user's stream of random numbers

    def random(part: Part) -> Tensor:
        shape = (1, size[0]) if part.per_row else (1, *size)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(part.dtype)

    def once() -> float:
        _synchronize(device)
        begin = time.perf_counter()
        plan.shape.solve(parts, plan.polar)
        _synchronize(device)
        return time.perf_counter() - begin

    try:
        parts = [random(part) for part in plan.there]
        first = once()
        seconds = first if first > _LONG_S else min(once() for _ in range(_SAMPLES))
    except RuntimeError as problem:  # out of memory, or a library's own
        logger.warning("ds_optim: a %s matrix could not be timed (%s)", _key(size), _line(problem))
        return None
    return float(f"{max(seconds * 1e3, _LEAST_MS):.3g}")


def _cached(name: str) -> Mapping[str, Mapping[str, _Kept]]:
    """What is known of a device; what is no cost is not."""
    path = cache_folder() / _FILE
    try:
        found: Mapping[str, Mapping[str, Any]] = read_table(path, VERSION)["devices"].get(name, {})
        return {
            job: {key: (float(kept[0]), kept[1]) for key, kept in costs.items() if _is_kept(kept)}
            for job, costs in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        logger.warning("ds_optim: the table of costs %s cannot be read (%s); matrices are timed anew", path, problem)
        return {}


def _keep(name: str, jobs: Mapping[str, Mapping[str, _Kept]]) -> None:
    """Add to the cache; a run goes on where that is not possible."""
    path = cache_folder() / _FILE
    try:
        table = read_table(path, VERSION)
    except (OSError, ValueError):
        table = {"version": VERSION, "devices": {}}
    own = table["devices"].get(name)
    own = table["devices"][name] = own if isinstance(own, dict) else {}
    for job, costs in jobs.items():
        own[job] = {**(own[job] if isinstance(own.get(job), dict) else {}), **costs}
    try:
        write_table(path, table)
    except OSError as problem:
        logger.warning("ds_optim: measured costs cannot be kept in %s (%s)", path, problem)


def _key(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0]
