"""Two ways to the polar factor of matrices that tensor parallelism cut along their long side: bytes and milliseconds.

    python -m benchmarks.tensor_polar --ranks 2,4 --out benchmarks/results/tensor_polar.jsonl

As many equal matrices as ranks. "owner" is what the package does: each matrix's shards travel to a rank of their own,
and its result back. "gram sums" leaves shards where they are: every rank adds its part to the s x s Gram matrix, by an
all-reduce for each segment of steps between restarts, and multiplies its shard by the same factor. Both are in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.bench.ranks import run
from ds_optim.matrix.newton_schulz import gram_segments
from ds_optim.matrix.polar import PolarSpec, polar
from ds_optim.matrix.schedules import schedule
from ds_optim.matrix.shapes import POLAR
from ds_optim.matrix.views import MatrixView
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.layout import Shard
from ds_optim.sharding.shards import ShardView, solve_whole

SHAPES = ((512, 512), (512, 1536), (512, 2048), (256, 2048), (256, 4096), (128, 4096))
REPEATS = 5


def gram_sums(comm: Comm, shard: Tensor, spec: PolarSpec) -> Tensor:
    """The same Newton-Schulz steps on shards (s, l / T), cut along the long side."""
    assert spec.steps is not None
    table = schedule(spec.schedule, spec.steps)
    norm = comm.all_reduce(shard.double().square().sum()).sqrt().float()
    x = shard / (norm * table.safety)
    done = 0
    for length in gram_segments(table, torch.float32):
        r = comm.all_reduce(x @ x.mT)
        factor = torch.eye(len(r))
        for a, b, c in table.triples[done : done + length]:
            step = b * r + c * (r @ r)
            step.diagonal().add_(a)
            factor, r = step @ factor, step @ r @ step
        x = factor @ x
        done += length
    return x


def measure(rank: int, world_size: int, shapes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """By shape what each way took and sent here, and how far their results are from each other."""
    comm = Comm.of_group(dist.group.WORLD)
    spec = PolarSpec(steps=5, dtype="float32", method="gram").resolve(torch.device("cpu"))
    there, back = POLAR.there(spec), POLAR.back(spec)
    found = []
    for s, length in shapes:
        sizes = length // world_size
        pieces = tuple(((r * sizes, sizes),) for r in range(world_size))
        whole = MatrixView(shape=(s, length))
        view = ShardView.of_whole(whole, Shard(whole=(s, length), dim=1, pieces=pieces), (s, sizes))
        stack = torch.randn(world_size, s * sizes, generator=torch.Generator().manual_seed(rank))

        def owner(view: ShardView = view, stack: Tensor = stack, s: int = s, length: int = length) -> Tensor:
            def solve(_: MatrixView, parts: Any) -> list[Tensor]:
                return [polar(parts[0].view(-1, s, length), spec).flatten(1)]

            return solve_whole(comm, 0, view, (there, back), [stack], solve)[0]

        def sums(stack: Tensor = stack, s: int = s, sizes: int = sizes) -> Tensor:
            return torch.stack([gram_sums(comm, m.view(s, sizes), spec).flatten() for m in stack])

        row: dict[str, Any] = {"apart": float((owner() - sums()).abs().max() / owner().abs().max())}
        for name, way in (("owner", owner), ("gram sums", sums)):
            before, times = comm.sent_bytes, []
            for _ in range(REPEATS):
                dist.barrier()
                begin = time.perf_counter()
                way()
                times.append((time.perf_counter() - begin) * 1e3)
            handed = (comm.sent_bytes - before) // REPEATS
            # A ring's all-reduce sends what it is handed 2 (T-1)/T times.
            sent = handed if name == "owner" else handed * 2 * (world_size - 1) / world_size
            row[name] = {"ms": statistics.median(times), "bytes": sent / world_size}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    for ranks in map(int, options.ranks.split(",")):
        results = run(ranks, measure, SHAPES)
        for number, (s, length) in enumerate(SHAPES):
            of_shape = [rank[number] for rank in results]
            for way in ("owner", "gram sums"):
                took = statistics.median(r[way]["ms"] for r in of_shape)
                sent = statistics.mean(r[way]["bytes"] for r in of_shape)
                apart = max(r["apart"] for r in of_shape)
                print(f"{ranks} ranks {s}x{length} {way:10s} {took:8.2f} ms {sent:12.0f} bytes, apart {apart:.1e}")
                if options.out is not None:
                    extra = {"shape": f"{s}x{length}", "ms": round(took, 2), "bytes_a_rank_and_matrix": round(sent)}
                    append_row(
                        options.out,
                        Row(kind="tensor_polar", optimizer=way, ranks=ranks, dtype="fp32", extra={**extra, **stamp}),
                    )


if __name__ == "__main__":
    main()
