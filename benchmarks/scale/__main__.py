"""How a step's time grows: over parameters, tensors and ranks, and laid out for clusters that are not there.

    python -m benchmarks.scale --out benchmarks/results/scale-2cores-cpu.jsonl --plots docs/images
    python -m benchmarks.scale --axes tensors --tensors 10,100 --against benchmarks/results/scale-2cores-cpu.jsonl

Stage 3, AdamW, Lion and Muon. The exponent printed is that of the last step of each axis: over the optimizer's
arithmetic where the model grows, over tensors, and of all ranks' time together over ranks. ``--against``: kept rows of
a like machine; what takes 1.25 times their share of AdamW's time or more is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.scale.cells import TRAINED, Cell, grid, measure, row_of, simulated
from ds_optim.bench.ranks import run
from ds_optim.report.machine import describe_machine
from ds_optim.report.plots import colour_map, draw, new_figure
from ds_optim.report.schema import Row, append_row

WORSE = 1.25
MODELS = Path(__file__).parents[2] / "docs" / "models"
X_OF = {"parameters": "parameters", "tensors": "matrices", "ranks": "ranks"}
Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class LogCurves:
    """Milliseconds over an axis, both by powers of ten."""

    name: str
    title: str
    x_label: str
    series: Mapping[str, list[tuple[float, float]]]

    def figure(self, colours: Mapping[str, str], ink: str) -> Any:
        figure, axes = new_figure(5.2, 3.3, ink)
        for label, points in self.series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=label, color=colours.get(label))
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel(self.x_label, color=ink)
        axes.set_ylabel("ms of processor time", color=ink)
        axes.grid(color=ink, alpha=0.15, linewidth=0.8)
        axes.legend(frameon=False, labelcolor=ink, fontsize=9)
        return figure


def growth(points: Iterable[tuple[float, float]]) -> float:
    """The exponent of the last step of a curve: 1 is as fast as what it is drawn over."""
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def curve(rows: Iterable[Row], axis: str, x: str, y: str) -> Points:
    """(x, y) by optimizer."""
    found: Points = {}
    for row in rows:
        if row.kind == "scale" and row.extra["axis"] == axis:
            place = row.ranks if x == "ranks" else row.extra[x]
            found.setdefault(row.optimizer, []).append((place, row.extra[y]))
    return {name: sorted(points) for name, points in found.items()}


def exponents(rows: list[Row]) -> dict[tuple[str, str], float]:
    """By axis and optimizer."""
    over = {"parameters": ("work", "ms"), "tensors": ("matrices", "ms"), "ranks": ("ranks", "all_ranks_ms")}
    return {
        (axis, name): growth(points)
        for axis, (x, y) in over.items()
        for name, points in curve(rows, axis, x, y).items()
        if len(points) > 1
    }


def worse(rows: list[Row], kept: list[Row]) -> list[str]:
    """What takes a larger share of AdamW's time in its cell than the kept rows say, beyond ``WORSE``."""
    before, now = _shares(kept), _shares(rows)
    return [
        f"{name}, {axis}, {matrices} x {shape}, {ranks} ranks: {now[key]:.2f} of AdamW's, {before[key]:.2f} before"
        for key in now.keys() & before.keys()
        if now[key] > WORSE * before[key]
        for axis, matrices, shape, ranks, name in [key]
    ]


def _shares(rows: list[Row]) -> dict[tuple[Any, ...], float]:
    times = {
        (row.extra["axis"], row.extra["matrices"], row.extra["shape"], row.ranks, row.optimizer): row.extra["ms"]
        for row in rows
        if row.kind == "scale"
    }
    adamw = {key[:-1]: ms for key, ms in times.items() if key[-1] == "AdamW"}
    return {key: ms / adamw[key[:-1]] for key, ms in times.items() if key[:-1] in adamw}


def rows_of(cell: Cell, rounds: int, stamp: Mapping[str, Any]) -> Iterable[Row]:
    for case in TRAINED:
        row = row_of(cell, case, run(cell.ranks, measure, cell, case, rounds))
        print(f"{cell.axis}: {cell.matrices:,} x {row['shape']}, {cell.ranks} ranks, {case}: {row['ms']:,.2f} ms, "
              f"first {row['first_ms']:,.0f}", flush=True)  # fmt: skip
        yield Row(kind="scale", optimizer=case, stage=3, ranks=cell.ranks, dtype="bf16", extra={**row, **stamp})


def laid_out(model: str, ranks: int, stage: int, stamp: Mapping[str, Any]) -> Row:
    found, seconds = simulated(MODELS / f"{model}.json", ranks, stage)
    print(f"{model}, stage {stage}, {ranks:,} ranks: laid out in {seconds:.2f} s, {found.mean_bytes / 2**20:.1f} MiB a "
          f"rank, busiest / bound {found.makespan:.3f}, waiting {100 * found.idle:.0f} %", flush=True)  # fmt: skip
    extra = {"model": model, "seconds": round(seconds, 3), "mean_bytes": found.mean_bytes, "makespan": found.makespan}
    return Row(kind="scale laid out", optimizer="Muon", stage=stage, ranks=ranks,
               extra={**extra, "idle": found.idle, **stamp})  # fmt: skip


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default="parameters,tensors,ranks,laid-out")
    parser.add_argument("--parameters", type=numbers, default=(1, 3, 10, 30, 100, 300), help="millions")
    parser.add_argument("--tensors", type=numbers, default=(10, 100, 1000, 10000))
    parser.add_argument("--ranks", type=numbers, default=(1, 2, 4))
    parser.add_argument("--models", default="llama-8b,llama-70b")
    parser.add_argument("--laid-out", type=numbers, default=(8, 64, 256, 1024))
    parser.add_argument("--rounds", type=int, default=3)
    for flag in ("--out", "--plots", "--against"):
        parser.add_argument(flag, type=Path)
    given = parser.parse_args()
    axes = given.axes.split(",")
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if given.out is not None:
            append_row(given.out, row)

    for cell in grid(given.parameters, tuple(map(int, given.tensors)), tuple(map(int, given.ranks))):
        for row in rows_of(cell, given.rounds, stamp) if cell.axis in axes else ():
            keep(row)
    if "laid-out" in axes:
        for model in given.models.split(","):
            for ranks in map(int, given.laid_out):
                keep(laid_out(model, ranks, 3, stamp))
    for (axis, name), exponent in exponents(rows).items():
        print(f"{axis}, {name}: grows with exponent {exponent:.2f}")
    for axis, x in X_OF.items() if given.plots is not None else ():
        if series := curve(rows, axis, x, "all_ranks_ms" if axis == "ranks" else "ms"):
            plot = LogCurves(name=f"scale-{axis}", title=f"A step over {axis}", x_label=axis, series=series)
            print(draw(plot, given.plots, colour_map(TRAINED)).png)
    kept = (
        []
        if given.against is None
        else [Row(**json.loads(line)) for line in given.against.read_text("utf-8").splitlines()]
    )
    found = worse(rows, kept)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
