"""``ds-optim accept`` as a user runs it: to its end, and with a kernel and a part that are broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_optim.accept.parts import PARTS
from ds_optim.cli.app import main
from ds_optim.report.schema import Row, read_rows

pytestmark = pytest.mark.full

BROKEN = """
import os
from ds_optim.accept import measured
from ds_optim.elementwise import native

whole = native.sign_step

def broken(p, *rest):
    done = whole(p, *rest)
    if done and p.dtype == getattr(p, "data", p).dtype:
        p[:1] += 1e-3
    return done

native.sign_step = broken
measured.polar = lambda settings, folder: os._exit(7)
"""


def accept(out: Path, *arguments: str) -> tuple[int, list[Row], str]:
    """The exit status, the rows and the page."""
    with pytest.raises(SystemExit) as ended:
        main(["accept", "--quick", "--out", str(out), *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, read_rows(out / "results.jsonl"), (out / "report.md").read_text()


def test_it_runs_to_its_end_on_ranks_of_a_cpu(tmp_path: Path) -> None:
    status, rows, page = accept(tmp_path / "out", "--minutes", "60")
    assert [(row.optimizer, row.reason) for row in rows if row.status != "ok"] == []
    assert status == 0
    assert {row.extra["part"] for row in rows} == set(PARTS)
    assert f"{len(rows)} of {len(rows)} hold: this machine is accepted." in page
    assert "| optimizers | LionMuon | 2 of 2 | 0 of the way" in page, "sharded and unsharded, to the bit"
    for fact in ("- CPU: ", "- torch: ", "- deepspeed: ", "- Ranks: 2"):
        assert fact in page
    assert (tmp_path / "out" / "report.html").exists()


def test_a_broken_kernel_and_a_part_that_dies(tmp_path: Path) -> None:
    plugin, out = tmp_path / "broken.py", tmp_path / "out"
    plugin.write_text(BROKEN)
    # In a process of its own: it imports what breaks.
    asked = ["accept", "--quick", "--out", str(out), "--only", "elementwise,polar,kernels", "--plugin", str(plugin)]
    done = subprocess.run([sys.executable, "-m", "ds_optim", *asked], capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr
    rows, page = read_rows(out / "results.jsonl"), (out / "report.md").read_text()
    failed = {(row.extra["part"], row.optimizer): row.reason for row in rows if row.status != "ok"}
    assert {part for part, _ in failed} == {"kernels", "polar"}
    assert "elements differ" in (failed["kernels", "sign_step"] or "")
    assert "status 7" in (failed["polar", "all of polar"] or "")
    assert sum(row.extra["part"] == "elementwise" for row in rows) > 15, "it ran after polar had died"
    assert " hold; not: kernels: sign_step (" in page
    assert "sign_step" in page
    assert "failed: sign_step: " in done.stderr
    assert "NOT accepted" in done.stderr
