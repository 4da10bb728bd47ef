"""Bytes sent per step and rank, beyond those of AdamW on the same model, beside the formula.

Counted twice: what is handed to collectives (dispatched operators, DeepSpeed's own included), and what passes the
loopback interface of a network namespace that holds nothing but the ranks (headers included; left out where a namespace
is not permitted, and where messages do not pass the network stack). The formula for stage 3 is 2 (N-1)/N^2 elements of
2 bytes per matrix element for a step that orthogonalizes, a P-th of it for LionMuon, 0 for sign rules (SpectralLion: 2
bytes there, with the weights' basis 4 more, and 1 back); at stages 1 and 2 it is what the exchange's plan says.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_optim.bench import engines, ranks
from ds_optim.bench.engines import ADAMW, RunSettings
from ds_optim.bench.timing import without_times
from ds_optim.machine.forked import usable_gpus
from ds_optim.memory.traffic import TrafficCounter, sent_bytes
from ds_optim.report.schema import Row

STEPS = 4
_TOKENS = 64
#: What a process does that has a network namespace of its own; its argument is the file of the settings.
_JOB = "import sys; from ds_optim.bench.wire import run_job; run_job(sys.argv[1])"
Measured = dict[str, dict[str, float]]


class WireSettings(RunSettings):
    """What is run; AdamW, which the others are compared with, is always among the cases."""


def rows(settings: WireSettings, stamp: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each case and stage; those of stages whose ranks failed say why they have no numbers."""
    prefix = () if usable_gpus() else ranks.private_network()
    left = list(settings.stages)
    try:
        for stage, by_rank in _in_namespace(prefix, settings) if prefix else _here(settings, False):
            yield from stage_rows(stage, by_rank, settings, bool(prefix), stamp)
            left.remove(stage)
    except ranks.RankFailedError as problem:
        for stage in left:
            for case in settings.cases:
                row = Row(kind="wire_bytes", optimizer=case, stage=stage, ranks=settings.ranks, dtype="bf16")
                row.extra = {"shape": str(settings.shape), **stamp}
                yield without_times(row, str(problem))


def _here(settings: WireSettings, private: bool) -> Iterator[tuple[int, list[Measured]]]:
    """(stage, what each rank measured), as soon as it is."""
    for stage in settings.stages:
        yield stage, ranks.run(settings.ranks, measure, stage, settings, private)


def _in_namespace(prefix: tuple[str, ...], settings: WireSettings) -> list[tuple[int, list[Measured]]]:
    """As ``_here``, by a process in a network of its own, which imports everything anew: one for all stages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job"
        path.write_bytes(pickle.dumps(settings))
        done = subprocess.run(
            [*prefix, sys.executable, "-c", _JOB, str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no reason was given"]
            raise ranks.RankFailedError(f"the ranks in a network of their own failed: {last[0]}")
        found: list[tuple[int, list[Measured]]] = pickle.loads(path.read_bytes())
        return found


def run_job(name: str) -> None:
    """Measure what the file says, and leave the result in its place."""
    path = Path(name)
    settings: WireSettings = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(list(_here(settings, True))))


def measure(rank: int, world_size: int, stage: int, settings: WireSettings, private: bool) -> Measured:
    """Per step: bytes this rank handed over, bytes on the interface (all ranks), and the plan's elements."""
    found = {}
    for case in settings.cases:
        engine = engines.build(case, stage, settings.shape)
        tokens = engines.random_tokens(engine, settings.shape.vocabulary, _TOKENS)
        engines.train_step(engine, tokens)  # binds, and makes state
        engines.train_step(engine, tokens)
        counter = TrafficCounter()
        before = _loopback_bytes(private)
        with counter:
            for _ in range(STEPS):
                engines.train_step(engine, tokens)
        after = _loopback_bytes(private)
        if counter.unknown:
            raise RuntimeError(f"collectives of unknown cost: {sorted(counter.unknown)}")
        exchanges = getattr(engine.basic_optimizer, "exchanges", {})
        found[case] = {
            "handed": counter.sent_bytes / STEPS,
            "interface": (after - before) / STEPS,
            "planned": sum(e.plan.sent_bytes(rank) for e in exchanges.values()),
            "bytes_an_element": max((e.plan.element_bytes for e in exchanges.values()), default=0),
            "matrix_elements": sum(s.numel for e in exchanges.values() for s in e.plan.unit.params),
        }
        engine.destroy()
    return found


def _loopback_bytes(private: bool) -> int:
    """What this namespace's ranks have sent, once all of it has arrived, and before they send more."""
    torch.distributed.barrier()
    sent = sent_bytes() if private else None
    torch.distributed.barrier()
    return 0 if sent is None else sent.inside


def stage_rows(
    stage: int, by_rank: list[Measured], settings: WireSettings, private: bool, stamp: Mapping[str, Any]
) -> Iterator[Row]:
    """The rows of one stage: means over the ranks, beside the formula."""
    n = len(by_rank)
    handed = {case: sum(rank[case]["handed"] for rank in by_rank) / n for case in settings.cases}
    interface = {case: by_rank[0][case]["interface"] / n for case in settings.cases}
    for case in settings.cases:
        every = int(engines.CASES[case]["params"].get("period", 1))
        first = by_rank[0][case]
        planned = sum(rank[case]["planned"] for rank in by_rank) / n / every
        whole = (n - 1) / n**2 * first["matrix_elements"] * first["bytes_an_element"] / every
        extra: dict[str, Any] = {
            "shape": str(settings.shape),
            "handed_over_adamw": handed[case] - handed[ADAMW],
            "planned": planned,
            "formula": whole if stage == 3 else planned,
        }
        if private:
            extra["interface"] = interface[case]
            extra["interface_over_adamw"] = interface[case] - interface[ADAMW]
        if extra["formula"]:
            extra["handed_ratio"] = round(extra["handed_over_adamw"] / extra["formula"], 4)
            if private:
                extra["interface_ratio"] = round(extra["interface_over_adamw"] / extra["formula"], 4)
        yield Row(
            kind="wire_bytes",
            optimizer=case,
            stage=stage,
            ranks=n,
            dtype="bf16",
            wire_bytes_per_step=handed[case],
            notes=[] if private else ["not measured at an interface: a network of its own is not permitted here"],
            extra={**extra, **stamp},
        )
