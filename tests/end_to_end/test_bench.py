"""``ds-optim bench``: each command as a user runs it, tiny, and ranks that end badly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ds_optim.bench import ranks
from ds_optim.bench.output import stamp
from ds_optim.bench.ranks import RankFailedError
from ds_optim.cli.app import main
from ds_optim.matrix import dispatch
from ds_optim.report import Row, read_rows

pytestmark = pytest.mark.full

MODEL = ("--ranks", "2", "--stages", "3", "--width", "32", "--layers", "2", "--vocabulary", "64")


def bench(out: Path, *arguments: str) -> list[Row]:
    """The rows that a command leaves, with its report and plot."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments, "--out", str(out)])
    assert not caught.value.code
    assert len(list((out / "plots").glob("*.png"))) == 1
    rows = read_rows(out / "rows.jsonl")
    table = (out / "report.md").read_text()
    assert f"ds-optim bench {arguments[0]} " in table.partition("## To reproduce")[2]
    today = stamp()
    for row in rows:
        assert row.optimizer in table
        assert row.extra["machine"] == today["machine"]
        assert row.extra["date"] <= today["date"]
    return rows


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = tmp_path / "traces"
    given = ("--tokens", "8", "--rounds", "1", "--cases", "AdamW,Lion,LionMuon", "--traces", str(traces))
    rows = bench(tmp_path, "step", *MODEL, *given)
    assert [(row.optimizer, row.stage, row.ranks) for row in rows] == [
        ("AdamW", 3, 2), ("Lion", 3, 2), ("LionMuon", 3, 2),
    ]  # fmt: skip
    times = {row.optimizer: row.ms_per_step for row in rows}
    for row in rows:
        assert row.ms_per_step is not None, row.notes
        assert row.ms_low is not None
        assert row.ms_high is not None
        assert row.ms_low <= row.ms_per_step <= row.ms_high
        assert 0 < row.extra["optimizer_ms"] < row.ms_per_step
        assert row.extra["ratios"]["step / AdamW"] == pytest.approx(row.ms_per_step / times["AdamW"], rel=0.01)
        assert row.extra["ratios"]["optimizer / limit"] > 1
        assert row.extra["limits"]["copy_gb_s"] > 0
        assert (row.extra["overlap"] is None) == (row.optimizer != "LionMuon"), "only its matrices travel"
    assert len(list(traces.iterdir())) == 6, "of each case, one a rank"
    shown = capsys.readouterr()
    assert "Limits: copies" in shown.out
    assert "Warning" not in shown.err


def test_wire(tmp_path: Path) -> None:
    rows = {row.optimizer: row for row in bench(tmp_path, "wire", *MODEL, "--cases", "Lion,LionMuon")}
    assert set(rows) == {"AdamW", "Lion", "LionMuon"}
    assert rows["AdamW"].extra["handed_over_adamw"] == 0
    assert rows["Lion"].extra["formula"] == 0
    assert rows["LionMuon"].extra["handed_ratio"] == pytest.approx(1.0, abs=0.01)
    assert all(("interface" in row.extra) == bool(ranks.private_network()) for row in rows.values())


def test_polar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path / "cache"))
    small = ("--shapes", "32x96,512x512", "--max-elements", "131072", "--rounds", "2", "--no-compiled")
    rows = bench(
        tmp_path / "out", "polar", *small, "--schedules", "keller", "--dtypes", "bf16", "--device", "cpu", "--store"
    )
    assert [(row.extra["shape"], row.ms_per_step is None) for row in rows] == [
        ("32x96", False), ("32x96", False), ("32x96", False), ("512x512", True),
    ]  # fmt: skip
    found = dispatch.gram_from(torch.device("cpu"), "bfloat16")
    shown = capsys.readouterr().out
    again = "bench polar --shapes 32x96,512x512 --max-elements 131072 --schedules keller --dtypes bf16 --rounds 2 "
    assert f"{again}--no-compiled --store --device cpu --out out\n" in (tmp_path / "out" / "report.md").read_text()
    assert "512x512 every routine: not measured: more than --max-elements 131072" in shown
    assert found is not None
    assert ("never wins" if found == float("inf") else f"wins above {found:g}") in shown


def test_elementwise(tmp_path: Path) -> None:
    rows = bench(tmp_path, "elementwise", "--elements", "5000", "--rounds", "2", "--device", "cpu")
    measured = {row.optimizer for row in rows if row.ms_per_step is not None}
    assert {"copy", "torch AdamW, fused", "sign step, int8 momentum", "blend into bfloat16"} <= measured
    assert all(row.extra.get("not_measured") for row in rows if row.ms_per_step is None)


def _told(rank: int, world_size: int, word: str) -> tuple[int, int, str]:
    print("this goes to the rank's log")
    return rank, world_size, word


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("bad\nluck")
    time.sleep(60)


def _one_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_ranks_answer_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks.run(2, _told, "yes") == [(0, 2, "yes"), (1, 2, "yes")]
    assert "this goes" not in "".join(capfd.readouterr())


def test_a_rank_that_fails_is_named_and_the_others_end() -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailedError, match=r"^rank 1: ValueError: bad luck$"):
        ranks.run(2, _one_fails)
    with pytest.raises(RankFailedError, match=r"^rank 1: killed, out of memory perhaps; .*: last words$"):
        ranks.run(2, _one_is_killed)
    assert time.monotonic() - begin < 50
