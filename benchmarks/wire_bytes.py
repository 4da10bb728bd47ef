"""Bytes sent per step and rank, beyond those of AdamW on the same model, beside the formula.

    python -m benchmarks.wire_bytes --ranks 2 --stages 1,2,3 --out benchmarks/results/wire_bytes.jsonl

Counted twice: what is handed to collectives (dispatched operators, DeepSpeed's own included), and what passes the
loopback interface of a network namespace that holds nothing but the ranks (headers included; skipped where a namespace
is not permitted). The formula for stage 3 is 2 (N-1)/N^2 elements of 2 bytes per matrix element for a step that
orthogonalizes, a P-th of it for LionMuon, 0 for sign rules (SpectralLion: 2 bytes there, with the weights' basis 4 more,
and 1 back); at stages 1 and 2 it is what the exchange's plan says.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, ranks
from ds_optim.memory.traffic import TrafficCounter
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row

STEPS = 4


def measure(
    rank: int, world_size: int, stage: int, cases: list[str], shape: tuple[int, int, int], private: bool
) -> dict[str, dict[str, float]]:
    """Per step: bytes this rank handed over, bytes on the interface (all ranks), and the plan's elements."""
    found = {}
    for case in cases:
        engine = engines.build(case, stage, *shape)
        tokens = torch.randint(0, shape[2], (1, 64))
        engines.train_step(engine, tokens)  # binds, and makes state
        engines.train_step(engine, tokens)
        counter = TrafficCounter()
        _quiet()
        before = ranks.loopback_bytes() if private else 0
        _quiet()
        with counter:
            for _ in range(STEPS):
                engines.train_step(engine, tokens)
        _quiet()
        after = ranks.loopback_bytes() if private else 0
        if counter.unknown:
            raise RuntimeError(f"collectives of unknown cost: {sorted(counter.unknown)}")
        workers = getattr(engine.basic_optimizer, "matrix_workers", {})
        found[case] = {
            "handed": counter.sent_bytes / STEPS,
            "interface": (after - before) / STEPS,
            "planned": sum(w.sent_bytes(rank) for w in workers.values()),
            "bytes_an_element": max((sum(w.travelling) for w in workers.values()), default=0),
            "matrix_elements": sum(s.numel for w in workers.values() for s in w.plan.unit.params),
        }
        engine.destroy()
    return found


def _quiet() -> None:
    """Let every rank's messages arrive before a counter is read."""
    torch.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--cases", default=",".join(engines.DEFAULT_CASES))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    private = ranks.in_private_network()
    shape = (options.width, options.layers, options.vocabulary)
    cases = options.cases.split(",")
    if "AdamW" not in cases:
        cases.insert(0, "AdamW")
    for stage in map(int, options.stages.split(",")):
        report(stage, ranks.run(options.ranks, measure, stage, cases, shape, private), private, options)


def report(stage: int, by_rank: list[Any], private: bool, options: Any) -> None:
    n = len(by_rank)
    handed = {case: sum(r[case]["handed"] for r in by_rank) / n for case in by_rank[0]}
    interface = {case: by_rank[0][case]["interface"] / n for case in by_rank[0]}
    for case in by_rank[0]:
        every = 2 if case == "LionMuon" else 1
        elements = by_rank[0][case]["matrix_elements"]
        planned = sum(r[case]["planned"] for r in by_rank) / n / every
        an_element = by_rank[0][case]["bytes_an_element"]
        formula = (n - 1) / n**2 * elements * an_element / every if stage == 3 else planned
        extra: dict[str, Any] = {
            "handed_over_adamw": handed[case] - handed["AdamW"],
            "planned": planned,
            "formula": formula,
            "machine": describe_machine(),
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        if private:
            extra["interface"] = interface[case]
            extra["interface_over_adamw"] = interface[case] - interface["AdamW"]
        if formula:
            extra["handed_ratio"] = round(extra["handed_over_adamw"] / formula, 4)
            if private:
                extra["interface_ratio"] = round(extra["interface_over_adamw"] / formula, 4)
        row = Row(
            kind="wire_bytes",
            optimizer=case,
            stage=stage,
            ranks=n,
            dtype="bf16",
            wire_bytes_per_step=handed[case],
            extra=extra,
        )
        shown = {k: v for k, v in extra.items() if k not in ("machine", "date")}
        print(f"stage {stage} {case:15} {handed[case]:14,.0f} B  {shown}", flush=True)
        if options.out:
            append_row(options.out, row)


if __name__ == "__main__":
    main()
