"""Overlap of messages and matrix work, read from a profiler's trace of a few training steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ds_optim.machine.forked import usable_gpus
from ds_optim.sharding.exchange import SOLVE

Span = tuple[float, float]
#: The exchange's messages: DeepSpeed's own collectives are of other kinds. gloo's span all their time, from posting
#: to arrival; NCCL's are the kernels on its own stream.
_GLOO, _NCCL = "gloo:all_to_all", "SendRecv"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Milliseconds that messages flew, and of these that the rank worked on matrices; both 0 where nothing flew."""

    messages_ms: float
    covered_ms: float


def traced(steps: Callable[[], object], path: Path) -> Overlap:
    """Run ``steps`` under a profiler, leave a Chrome trace at ``path`` (.json or .json.gz), and read the overlap."""
    activities = [ProfilerActivity.CPU]
    on_gpu = usable_gpus() > 0
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        steps()
        if on_gpu:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return overlap_of(_events(path))


def overlap_of(events: Sequence[dict[str, Any]]) -> Overlap:
    """The overlap in a Chrome trace's events, whose times are microseconds."""
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") == "kernel" and _NCCL in event["name"]]
    messages = kernels or [event for event in spans if event["name"] == _GLOO]
    where = "gpu_user_annotation" if kernels else "user_annotation"
    work = [event for event in spans if event["name"] == SOLVE and event.get("cat") == where]
    under_way = _union((event["ts"], event["ts"] + event["dur"]) for event in messages)
    working = _union((event["ts"], event["ts"] + event["dur"]) for event in work)
    return Overlap(messages_ms=_length(under_way) / 1e3, covered_ms=_length(_common(under_way, working)) / 1e3)


def _events(path: Path) -> list[dict[str, Any]]:
    import gzip

    data = path.read_bytes()
    found: list[dict[str, Any]] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return found


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _common(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """What two unions share."""
    return [(max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) < min(b, d)]


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)
