"""What a step launches, waits for and copies on a pretended CUDA, by number of parameters: the table in docs/speed.md.

python -m tests.cuda_counts            # count, and write the table
python -m tests.cuda_counts --before   # keep these counts as those that later ones are compared with
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from ds_optim.elementwise.native import library
from ds_optim.report.schema import Row, read_rows, write_rows
from tests.fake_cuda import dry_steps, small

ROOT = Path(__file__).parents[1]
PAGE, MARKS = ROOT / "docs" / "speed.md", ("<!-- counted: a step on CUDA -->\n", "<!-- end -->")
BEFORE = ROOT / "benchmarks" / "results" / "cuda_counts-dry-2026-11-28.jsonl"
LAYERS = (2, 20, 200)
RANKS = 4
MODELLED: dict[str, Any] = {"exchange": {"costs": "modelled"}}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A line of the table."""

    type: str
    stage: int = 3
    momentum_dtype: str = "float32"
    offload: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.type + ", offloaded" * self.offload


LINES = (
    Counted(type="Lion"),
    Counted(type="Lion", stage=0),
    Counted(type="Lion", momentum_dtype="bfloat16"),
    Counted(type="Lion", momentum_dtype="int8"),
    Counted(type="CautiousLion"),
    Counted(type="StableLion"),
    Counted(type="StoSignSGD"),
    Counted(type="Lamb"),
    Counted(type="Muon", params=MODELLED),
    Counted(type="Muon", stage=1, params=MODELLED),
    Counted(type="Muon", momentum_dtype="int8", params=MODELLED),
    Counted(type="NorMuon", params=MODELLED),
    Counted(type="Dion2", params=MODELLED),
    Counted(type="Muon", offload=True, params=MODELLED),
)


def count(line: Counted, layers: int) -> Row:
    """The second step of rank 0 of four; the aux rule is Lion."""
    params = dict(line.params)
    if line.momentum_dtype != "float32":
        params["momentum_dtype"] = line.momentum_dtype
    model = small(layers)
    with no_addresses():
        _, counts = dry_steps(line.type, model, stage=line.stage, ranks=RANKS, offload=line.offload, **params)
    return Row(
        kind="cuda_counts",
        optimizer=line.title,
        momentum_dtype=line.momentum_dtype,
        stage=line.stage,
        ranks=RANKS,
        extra={
            "parameters": len(model),
            "launches": counts.launches,
            "syncs": sum(counts.syncs.values()),
            "crossings": sum(counts.crossings.values()),
            "messages": sum(counts.messages.values()),
            "scratch": counts.peak,
        },
    )


@contextmanager
def no_addresses() -> Iterator[None]:
    """Compiled kernels of the CPU take addresses of memory, which these tensors have not."""
    with mock.patch.object(library, "library", return_value=None):
        yield


def table(rows: list[Row], before: list[Row]) -> str:
    """Markdown: a line for each of ``LINES``, a number for each size, "was → is" where it changed."""
    sizes = list(dict.fromkeys(row.extra["parameters"] for row in rows))
    names = ("launches", "syncs", "crossings")
    head = ["optimizer", "stage", "momentum", *(f"{name}, {size:,} parameters" for name in names for size in sizes)]
    lines = [_line(head), _line(["---", "---:", "---", *["---:"] * (len(head) - 3)])]
    old = {_key(row): row for row in before}
    for first in rows[:: len(sizes)]:
        of_line = [row for row in rows if _key(row)[:3] == _key(first)[:3]]
        cells = [first.optimizer, str(first.stage), first.momentum_dtype]
        lines.append(_line([*cells, *(_cell(row, old.get(_key(row)), name) for name in names for row in of_line)]))
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[str, int | None, str, int]:
    return row.optimizer, row.stage, row.momentum_dtype, row.extra["parameters"]


def _cell(row: Row, old: Row | None, name: str) -> str:
    now, was = row.extra[name], None if old is None else old.extra[name]
    return f"{now:,}" if was in (None, now) else f"{was:,} → {now:,}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def written(text: str) -> str:
    """What stands between the marks of a page."""
    begin, end = map(re.escape, MARKS)
    found = re.search(f"{begin}(.*?){end}", text, re.DOTALL)
    assert found is not None, f"{PAGE.name} has no marks {MARKS}"
    return found[1]


def main(arguments: list[str]) -> None:
    """Count all, then write the table or, with --before, the rows."""
    logging.disable(logging.WARNING)
    rows = []
    for line in LINES:
        for layers in LAYERS:
            rows.append(count(line, layers))
            print(line.title, line.stage, line.momentum_dtype, rows[-1].extra, file=sys.stderr, flush=True)
    if "--before" in arguments:
        write_rows(BEFORE, rows)
        return
    text = PAGE.read_text(encoding="utf-8")
    new = text.replace(written(text), "\n" + table(rows, read_rows(BEFORE)) + "\n")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
