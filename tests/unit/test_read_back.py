"""What is read back is untrusted input: a value of a stated type, or one line; never a wait, and nothing outside."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from ds_optim.cli import app as cli
from ds_optim.data import tokens
from ds_optim.errors import UserError
from ds_optim.job import models
from ds_optim.job.run_log import RunLog, keep_until
from ds_optim.job.settings import make_settings
from ds_optim.machine import files, ranks
from ds_optim.machine.files import Unreadable
from ds_optim.machine.kept_results import RESULTS, RUN_FILE
from ds_optim.machine.run_lock import LOCK_NAME, RunLock
from ds_optim.report.memory_csv import write_csv
from ds_optim.report.merge import merge_runs
from ds_optim.report.schema import Row, RunInfo, read_rows
from ds_optim.report.table import build_table, markdown_text, to_markdown, to_rich
from ds_optim.zero.checkpoints import safe
from tests import fuzz_read_back
from tests.tiers import ALL, FULL


class Pair(BaseModel):
    """What a JSON of these tests holds."""

    name: str
    count: int


def test_no_flip_and_no_change_of_structure_gets_through(tmp_path: Path) -> None:
    """A few, with --full a few hundred, the same each time; DS_OPTIM_ALL_CELLS: all of ``tests.fuzz_read_back``."""
    flips, changes = (20_000, 1000) if ALL else (220, 110) if FULL else (60, 60)
    counts, wrong = fuzz_read_back.fuzz(tmp_path, flips=flips, changes=changes, seed=3)
    assert wrong == []
    assert sum(counts.values()) >= flips + changes
    shards = {name: count for name, count in counts.items() if "_states.pt: flipped" in name}
    assert set(name.rpartition(" ")[2] for name in shards) == {"refused"}
    assert len([name for name in counts if name.endswith("untouched: taken")]) == 11


# ---- files


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "is no regular file"),
        ("folder", "is no regular file"),
        ("link", "is a symbolic link"),
        ("link to a device", "is a symbolic link"),
        ("socket", "is no regular file"),
        ("missing", "is missing"),
    ],
)
def test_nothing_is_opened_that_is_no_regular_file(tmp_path: Path, kind: str, said: str) -> None:
    (tmp_path / "other").write_text("{}")
    fuzz_read_back.KINDS[kind](tmp_path / "file", tmp_path / "other")
    with pytest.raises(Unreadable, match=said):
        files.read_bytes(tmp_path / "file")
    if kind != "missing":
        with pytest.raises(Unreadable):
            files.open_append(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "3", '{"name": "a"}', '{"name": "a", "count": "3"}', '{"name": "a", "count": 3.0}'),
        *(
            '{"name": "\\ud800", "count": 3}',
            '{"name": "a", "count": ' + "[" * 100_000,
            "[" * 100_000,
            '{"a":' * 10_000,
        ),
        *('{"name": 1, "count": ' + "9" * 5000 + "}", '{"name": "a", "count": 3}garbage'),
    ],
)
def test_json_is_of_its_type_or_one_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Unreadable, match=r"^is damaged \(") as caught:
        files.read_json(tmp_path / "a.json", Pair)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    (tmp_path / "a.json").write_text('{"name": "a", "count": 3}')
    assert files.read_json(tmp_path / "a.json", Pair) == Pair(name="a", count=3)
    with pytest.raises(Unreadable, match="is larger than 10 bytes"):
        files.read_json(tmp_path / "a.json", Pair, limit=10)


def test_what_is_written_replaces_a_link_and_never_goes_through_one(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("end.json", "end.json.partial"):
        (tmp_path / name).symlink_to(outside)
    files.write_atomic(tmp_path / "end.json", "new")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "end.json").is_symlink()
    assert (tmp_path / "end.json").read_text() == "new"
    # What a writer that was killed left behind goes with the next write, once it is old.
    left = tmp_path / "end.json.0123abcd.partial"
    left.touch()
    files.write_atomic(tmp_path / "end.json", "newer")
    assert left.exists()
    os.utime(left, (0, 0))
    files.write_atomic(tmp_path / "end.json", "newest")
    assert not left.exists()


# ---- the log, the lock


def test_lines_of_a_log_that_cannot_be_read_are_dropped_and_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "warning": "\xc3\xa4"}\n'
    bad = (b"\xff\n", b"3\n", b"{}\n", b"null\n", b'{"step": "1"}\n', b'{"step": 1e999}\n', b"x" * 3_000_000 + b"\n")
    path.write_bytes(bad[0] + good + b"".join(bad[1:]) + b'{"step": 3}\n{"step": 1, "lo')
    said = keep_until(path, 2)
    assert path.read_bytes() == good
    assert said is not None
    assert said.startswith("log.jsonl has ")
    assert said.endswith(" lines that cannot be read: dropped")
    assert keep_until(path, 2) is None
    assert keep_until(path, 0) is None
    assert path.read_bytes() == b""


def test_a_run_goes_on_without_a_log_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").mkdir()
    log = RunLog(tmp_path, 3, active=True, first_step=1)
    log.step({"step": 2, "loss": 1.0, "lr": 0.1, "tokens_per_s": 1.0})
    log.close()
    assert "ds-optim: warning: log.jsonl is not written: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("pid", ["-1", "0", "9" * 400, "1e999", "null", "[" * 1000])
def test_a_damaged_lock_is_nobodys(tmp_path: Path, pid: str) -> None:
    (tmp_path / LOCK_NAME).write_text('{"host": "h", "place": "p", "started": 1.0, "pid": ' + pid + "}")
    lock = RunLock()
    lock.take(tmp_path)
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    lock.release()


# ---- a tensor's file


def test_a_file_that_would_unpack_to_more_than_it_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    assert torch.equal(safe.load(tmp_path / "good.pt")["a"], torch.ones(3))
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
    with pytest.raises(UserError, match=r"bomb\.pt is refused: parts of it are compressed, which torch never does"):
        safe.load(bomb)
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", bytes(safe.PICKLE_LIMIT + 1))
    with pytest.raises(UserError, match=r"its data\.pkl is larger than"):
        safe.load(bomb)


def test_files_of_torchs_older_kind_are_still_read_and_their_payloads_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(safe.load(tmp_path / "old.pt")["a"], torch.ones(3))

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    (tmp_path / "old.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(UserError, match="is refused, and nothing in it was run") as caught:
        safe.load(tmp_path / "old.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it ran").exists()


class Asked:
    """Pickles as ``getattr(owner, name)``, as members of enumerations do in Python 3.11.2."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_a_stage_is_read_however_python_pickles_it_and_nothing_else_is_asked_for(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    stage = ZeroStageEnum.optimizer_states
    path = tmp_path / "stage.pt"
    for written in (stage, Asked(ZeroStageEnum, "optimizer_states")):
        torch.save({"zero_stage": written}, path)
        assert safe.load(path)["zero_stage"] is stage
    for owner, name in (
        (ZeroStageEnum, "__class__"),
        (ZeroStageEnum, "mro"),
        (torch.Tensor, "__init__"),
        (dict, "get"),
    ):
        torch.save({"zero_stage": Asked(owner, name)}, path)
        with pytest.raises(UserError, match="is refused, and nothing in it was run: Unsupported"):
            safe.load(path)


# ---- code of others


def test_no_code_of_a_model_or_tokenizer_is_asked_about_or_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'it ran')!r}, 'w')\n"
    (tmp_path / "own.py").write_text(code)
    config = {"model_type": "of_its_own", "vocab_size": 300, "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    map_of = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OfItsOwn"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(map_of))
    for load in (lambda: models.model_config(str(tmp_path), 257), lambda: tokens.HubTokenizer(str(tmp_path))):
        with pytest.raises(UserError, match="asks for code of its own") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "it ran").exists()


def test_a_kept_tokenizer_that_was_damaged_is_trained_anew(tmp_path: Path) -> None:
    text = ["the same text, the same tokens " * 5]
    made = tokens.cached_bpe(text, 300, tmp_path)
    (path,) = tmp_path.glob("tokenizer-*.json")
    for damaged in (
        path.read_bytes().replace(b"single", b"sinGle"),
        path.read_bytes().replace(b"259", b"258"),
        b"",
        b"{",
    ):
        path.write_bytes(damaged)
        assert tokens.cached_bpe(text, 300, tmp_path) == made
        assert tokens.cached_bpe(text, 300, tmp_path) == made


# ---- results and reports


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_bytes", "9" * 400),
        ("optimizer", '"' + "x" * 1_000_000 + '"'),
        ("extra", "[" * 3000),
        ("reason", '"\\ud800"'),
    ],
)
def test_a_row_of_no_sense_is_one_line(tmp_path: Path, field: str, value: str) -> None:
    others = "" if field == "optimizer" else '"optimizer": "lion", '
    (tmp_path / RESULTS).write_text(f'{{{others}"{field}": {value}}}\n')
    with pytest.raises(UserError, match="line 1 is no results row") as caught:
        read_rows(tmp_path / RESULTS)
    assert len(str(caught.value)) < 500


def test_rows_that_their_command_never_wrote_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(kind="memory", optimizer="lion", stage=1, extra={"optimizer_state_bytes": 10**400})
    (tmp_path / RESULTS).write_text(row.model_dump_json() + "\n")
    (tmp_path / RUN_FILE).write_text(RunInfo(title="memory").model_dump_json())
    with pytest.raises(UserError, match="the rows are none that ds-optim memory wrote"):
        merge_runs([tmp_path], tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out2")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2", "@SUM(A1)", " =1", "\t=cmd|' /C calc'!A0"])
def test_a_cell_of_text_is_no_formula_and_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    import csv

    write_csv([Row(optimizer=text, stage=-1, reason="fine", peak_bytes=-5)], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["optimizer"] == f"'{text}"
    assert (row["stage"], row["reason"], row["peak_bytes"]) == ("-1", "fine", "-5")


def test_markdown_and_terminal_show_a_label_as_it_is() -> None:
    from io import StringIO

    from rich.console import Console

    from ds_optim.report.compare import table_spec

    label = "a|b [c](d) <img> `e` *f*\n| g [/red]"
    rows = [Row(optimizer=label, stage=1, val_loss=1.0), Row(optimizer="lion", stage=1, status="failed", reason=label)]
    table = build_table(rows, table_spec(rows))
    lines = to_markdown(table).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1
    assert markdown_text(label) == "a\\|b \\[c\\](d) \\<img> \\`e\\` \\*f\\* \\| g \\[/red\\]"
    shown = StringIO()
    Console(file=shown, width=200).print(to_rich(table))
    assert "[/red]" in shown.getvalue()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files: raise the limit (ulimit -n)"),
        (MemoryError(), "there is not enough memory for this (ulimit -v limits it too)"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "there is not enough memory for this"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory for this"),
    ],
)
def test_a_limit_of_the_shell_is_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli.typer.main, "get_command", lambda app: SimpleNamespace(main=run))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train"])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"ds-optim: error: {told}")


@pytest.mark.parametrize(("limits", "enough"), [((24, 40), False), ((24, 4096), True), ((1024, 4096), True)])
def test_a_rank_may_open_the_files_it_needs_or_says_so(
    limits: tuple[int, int], enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ranks.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(ranks.resource, "setrlimit", lambda which, wanted: asked.append(wanted))
    if enough:
        ranks._allow_files()
        assert asked == ([] if limits[0] >= 256 else [(256, limits[1])])
    else:
        with pytest.raises(UserError, match="may open 40 files here, and a rank opens up to 256: raise ulimit -n"):
            ranks._allow_files()


def test_settings_hold_text_alone() -> None:
    for given in ({"data": "a\udcff.txt"}, {"deepspeed": {"x": ["\ud800"]}}):
        with pytest.raises(UserError, match="no text in UTF-8"):
            make_settings(**given)
