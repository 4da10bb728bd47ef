"""Results of before stay: a command refuses to write over them, or takes a folder of its own."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from ds_optim.bench import output
from ds_optim.cli import app as cli
from ds_optim.errors import UserError
from ds_optim.machine import shared_memory
from ds_optim.machine.kept_results import RESULTS, RUN_FILE
from ds_optim.report.schema import Row, RunInfo, write_rows
from ds_optim.sweep import options as sweep_options


def a_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / RESULTS, [Row(optimizer="lion", stage=1, val_loss=1.0, ms_per_step=1.0)])
    (folder / RUN_FILE).write_text(RunInfo(title="a run").model_dump_json())
    return folder


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_default_folder_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = Path("runs/compare")
    assert sweep_options.folder(None, default) == default
    a_run(default)
    assert sweep_options.folder(None, default) == Path("runs/compare-2")
    a_run(Path("runs/compare-2"))
    assert sweep_options.folder(None, default) == Path("runs/compare-3")
    # What goes on, or replaces, means the newest of them.
    assert sweep_options.folder(None, default, resume=True) == Path("runs/compare-2")
    assert sweep_options.folder(Path("mine"), default) == Path("mine")


def test_a_report_takes_no_other_reports_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(Path("runs/a"))
    for place in ("runs/report", "runs/report-2"):
        assert ended("report", "runs/a") == 0
        assert f"{place}/report.md" in capsys.readouterr().out
    before = Path("runs/report/report.md").read_bytes()
    assert ended("report", "runs/a", "--out", "runs/report") == 2
    assert "runs/report holds results.jsonl of an earlier run: add --force to replace it" in capsys.readouterr().err
    assert Path("runs/report/report.md").read_bytes() == before
    assert ended("report", "runs/a", "--out", "runs/report", "--force") == 0


def test_a_hostfile_and_the_rows_of_a_benchmark_are_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts"
    assert ended("hostfile", "node1:2", "--out", str(path)) == 0
    assert ended("hostfile", "node1:2", "--out", str(path)) == 0
    assert ended("hostfile", "node1:3", "--out", str(path)) == 2
    assert "says something else already: add --force" in capsys.readouterr().err
    assert path.read_text() == "node1 slots=2\n"
    assert ended("hostfile", "node1:3", "--out", str(path), "--force") == 0
    assert path.read_text() == "node1 slots=3\n"

    output.open_folder(tmp_path / "bench", force=False)
    write_rows(tmp_path / "bench" / output.ROWS, [Row(optimizer="lion")])
    with pytest.raises(UserError, match=r"holds rows\.jsonl of an earlier run: add --force"):
        output.open_folder(tmp_path / "bench", force=False)
    assert (tmp_path / "bench" / output.ROWS).stat().st_size
    output.open_folder(tmp_path / "bench", force=True)
    assert not (tmp_path / "bench" / output.ROWS).stat().st_size


def test_shared_memory_that_nobody_maps_is_swept(tmp_path: Path) -> None:
    name = shared_memory.segment({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0"})
    assert name == f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_1_0"
    old = time.time() - 100
    young, used, left, others = name, name[:-1] + "1", name[:-1] + "2", "torch_1_2"
    for each in (young, used, left, others):
        (tmp_path / each).write_bytes(b"x" * 4096)
    for each in (used, left, others):
        os.utime(tmp_path / each, (old, old))
    with (tmp_path / used).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert shared_memory.sweep(tmp_path) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young, used, others])
    assert shared_memory.sweep(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young, others])
