"""One rank a node: bytes that a step sends through the node's interface, by optimizer and stage, beside the formula.

Started by torchrun as ``wire_job.py INTERFACE``; rank 0 prints a line of JSON for each optimizer and stage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ds_optim.bench import engines
from ds_optim.machine import ranks

CASES = ("AdamW", "Lion", "Muon", "LionMuon", "SpectralLion")
SHAPE = engines.ModelShape(width=128, layers=3, vocabulary=256)
STEPS = 4
_TOKENS = 32


def sent(interface: str) -> int:
    """Bytes that this node has sent, headers included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    counters = next(line.partition(":")[2] for line in lines if line.strip().startswith(f"{interface}:"))
    return int(counters.split()[8])


def measure(case: str, stage: int, interface: str) -> dict[str, float]:
    """Per step: bytes sent by this node, and by the exchange's plan and formula the bytes beyond AdamW's."""
    engine = engines.build(case, stage, SHAPE)
    tokens = engines.random_tokens(engine, SHAPE.vocabulary, _TOKENS)
    for _ in range(2):  # binds, makes state and connections
        engines.train_step(engine, tokens)
    torch.distributed.barrier()
    before = sent(interface)
    for _ in range(STEPS):
        engines.train_step(engine, tokens)
    torch.distributed.barrier()
    count = (sent(interface) - before) / STEPS
    exchanges = getattr(engine.basic_optimizer, "exchanges", {})
    every = int(engines.CASES[case]["params"].get("period", 1))
    world = ranks.world_size()
    elements = sum(s.numel for e in exchanges.values() for s in e.plan.unit.params)
    itemsize = max((e.plan.element_bytes for e in exchanges.values()), default=0)
    planned = sum(e.plan.sent_bytes(ranks.rank()) for e in exchanges.values()) / every
    engine.destroy()
    formula = (world - 1) / world**2 * elements * itemsize / every if stage == 3 else planned
    return {"sent": count, "planned": planned, "formula": formula}


def main(interface: str) -> None:
    ranks.join()
    for stage in (1, 2, 3):
        for case in CASES:
            found = ranks.gather(measure(case, stage, interface))
            if ranks.rank() == 0:
                means = {key: sum(rank[key] for rank in found) / len(found) for key in found[0]}
                print(json.dumps({"case": case, "stage": stage, **means}), flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
