"""What a step costs beside its arithmetic: many small matrices at stage 3, our steps and AdamW's own by turns.

    python -m benchmarks.small_matrices --ranks 2 --matrices 1000 --out benchmarks/results/small_matrices.jsonl

As in a mixture of small experts. Timed is the optimizer's own step, inside of DeepSpeed's, in processor time of the
thread that calls it, which other programs and waits for messages hardly touch; "Muon, moved alone" is
Muon whose matrices travel to their owners and back and are not worked on. ``--profile`` prints where rank 0's time of
that case goes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optim
from ds_optim.bench.ranks import run
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row

MOVED_ALONE = "Muon, moved alone"
MODELLED = {"exchange": {"costs": "modelled"}}
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": False}},
    "Lion": {"type": "Lion", "params": {}},
    "Lion, int8": {"type": "Lion", "params": {"momentum_dtype": "int8"}},
    "NorMuon": {"type": "NorMuon", "params": MODELLED},
    "Muon": {"type": "Muon", "params": MODELLED},
    MOVED_ALONE: {"type": "Muon", "params": MODELLED},
}


class Matrices(nn.Module):
    """So many equal matrices, gathered at once."""

    def __init__(self, count: int, shape: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number in range(count):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape) / shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([weight.mul(x.to(weight.dtype)).square().mean() for weight in self.parameters()]).mean()


def engine_of(case: str, count: int, shape: tuple[int, int]) -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 0.0}
    config |= {"optimizer": CASES[case], "zero_optimization": {"stage": 3}}
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = ds_optim.initialize(model=Matrices(count, shape), config=config)
    return engine


def own_step(engine: Any, profile: cProfile.Profile | None = None) -> float:
    """Processor seconds of the optimizer's step in one of the engine's, on all of its sub-groups."""
    optimizer, seconds = engine.optimizer.optimizer, 0.0
    plain = optimizer.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        dist.barrier()
        begin = time.thread_time()
        result = profile.runcall(plain, *args, **kwargs) if profile else plain(*args, **kwargs)
        seconds += time.thread_time() - begin
        return result

    optimizer.step = timed
    engine.backward(engine(torch.randn(engine.scale)))
    engine.step()
    del optimizer.step
    return seconds


def measure(
    rank: int, world_size: int, count: int, shape: tuple[int, int], rounds: int, cases: tuple[str, ...], profile: bool
) -> dict[str, Any]:
    engines = {}
    for case in cases:
        engines[case] = engine_of(case, count, shape)
        engines[case].scale = shape[1]
        own_step(engines[case])
    if MOVED_ALONE in engines:
        for exchange in engines[MOVED_ALONE].optimizer.optimizer.exchanges.values():
            alone = replace(exchange.plan.shape, solve=lambda parts, _: [parts[0]])
            exchange.plan = replace(exchange.plan, shape=alone)
    times: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, engine in engines.items():
            seconds = own_step(engine)
            if number:
                times[case].append(seconds * 1e3)
    shown = io.StringIO()
    if profile:
        found = cProfile.Profile()
        for _ in range(3):
            own_step(engines[cases[-1]], found)
        pstats.Stats(found, stream=shown).sort_stats("tottime").print_stats(25)
    return {"times": times, "profile": shown.getvalue()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--matrices", type=int, default=1000)
    parser.add_argument("--shape", default="32x64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=";".join(CASES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, columns = map(int, given.shape.split("x"))
    cases = tuple(given.cases.split(";"))
    results = run(given.ranks, measure, given.matrices, (rows, columns), given.rounds, cases, given.profile)
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    slowest = {case: [max(r["times"][case][k] for r in results) for k in range(given.rounds)] for case in cases}
    for case, times in slowest.items():
        ms = statistics.median(times)
        extra = {"ms": round(ms, 2), "us_a_slice": round(1e3 * ms / given.matrices, 2), "shape": given.shape}
        extra |= {"matrices": given.matrices, "all_ms": [round(one, 2) for one in times]}
        if "AdamW" in slowest:
            extra["ratio"] = round(ms / statistics.median(slowest["AdamW"]), 2)
        print(f"{case:20s} {ms:8.2f} ms {extra['us_a_slice']:7.2f} us a slice, {extra.get('ratio', '')} of AdamW's")
        if given.out is not None:
            append_row(
                given.out,
                Row(kind="small_matrices", optimizer=case, stage=3, ranks=given.ranks, extra={**extra, **stamp}),
            )
    print(results[0]["profile"])


if __name__ == "__main__":
    main()
