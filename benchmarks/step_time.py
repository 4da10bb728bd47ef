"""Milliseconds per training step, interleaved in one run: ours against AdamW and DeepSpeed's own Muon.

    python -m benchmarks.step_time --ranks 2 --stages 1,2,3 --out benchmarks/results/step_time.jsonl

All engines of a stage live in the same processes and take turns, a few steps each, so that whatever else the machine
does meets all of them alike; the median over all timed steps counts, of the slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, ranks
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row


def measure(
    rank: int, world_size: int, stage: int, cases: list[str], shape: tuple[int, int, int], tokens: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each timed step, in all and in ``engine.step``, by case."""
    torch.manual_seed(rank)
    built = {case: engines.build(case, stage, *shape) for case in cases}
    times: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for turn in range(rounds + 1):
        for case, engine in built.items():
            for number in range(4):
                batch = torch.randint(0, shape[2], (1, tokens))
                torch.distributed.barrier()
                whole, step = engines.train_step(engine, batch)
                # The first turn warms up; an engine's first step of a turn finds cold caches.
                if turn and number:
                    times[case][0].append(whole)
                    times[case][1].append(step)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--cases", default=",".join(engines.DEFAULT_CASES))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a rank and step")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = (options.width, options.layers, options.vocabulary)
    cases = options.cases.split(",")
    for stage in map(int, options.stages.split(",")):
        by_rank = ranks.run(options.ranks, measure, stage, cases, shape, options.tokens, options.rounds)
        report(stage, by_rank, cases, options, shape)


def report(stage: int, by_rank: list[Any], cases: list[str], options: Any, shape: tuple[int, int, int]) -> None:
    whole = {c: [max(r[c][0][i] for r in by_rank) * 1e3 for i in range(len(by_rank[0][c][0]))] for c in cases}
    step = {c: [max(r[c][1][i] for r in by_rank) * 1e3 for i in range(len(by_rank[0][c][1]))] for c in cases}
    for case in cases:
        quartiles = statistics.quantiles(whole[case], n=4)
        ratios = {
            f"{what} / {other}": round(statistics.median(times[case]) / statistics.median(times[other]), 3)
            for what, times in (("step", whole), ("optimizer", step))
            for other in ("AdamW", "deepspeed:Muon")
            if other in cases
        }
        row = Row(
            kind="step_time",
            optimizer=case,
            stage=stage,
            ranks=options.ranks,
            dtype="bf16",
            ms_per_step=round(quartiles[1], 2),
            ms_low=round(quartiles[0], 2),
            ms_high=round(quartiles[2], 2),
            extra={
                "optimizer_ms": round(statistics.median(step[case]), 2),
                "ratios": ratios,
                "shape": "Qwen3, {} wide, {} layers, vocabulary {}".format(*shape),
                "tokens": options.tokens,
                "machine": describe_machine(),
                "date": datetime.now(timezone.utc).date().isoformat(),
            },
        )
        print(
            f"stage {stage} {case:15} {row.ms_per_step:8.1f} ms ({row.ms_low}-{row.ms_high}), "
            f"optimizer {row.extra['optimizer_ms']:7.1f} ms  {ratios}",
            flush=True,
        )
        if options.out:
            append_row(options.out, row)


if __name__ == "__main__":
    main()
