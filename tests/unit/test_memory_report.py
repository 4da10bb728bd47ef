"""The report of ``ds-optim memory``: repeats, savings, what is flagged, CSV, and runs of several machines as one."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.memory.estimate import MemoryEstimate
from ds_optim.memory.passes import Moment, Passes
from ds_optim.report import Row, RunInfo, read_rows, write_rows
from ds_optim.report.memory import memory_answers, merge_repeats, reconciliation, render_memory, with_savings
from ds_optim.report.merge import merge_runs
from ds_optim.sweep.memory_estimate import CellEstimate
from ds_optim.sweep.memory_rows import reconcile

MIB = 1 << 20
OWNERS = {"weights": 2 * MIB, "gradients": MIB, "master": 4 * MIB, "buckets": 0}


def row(optimizer: str, state: int, peak: int = 40 * MIB, **given: Any) -> Row:
    """A row of 2 ranks and a million parameters whose optimizer keeps ``state`` bytes on a rank."""
    peaks = [
        {"rank": rank, "host": "one", "first_step": peak - MIB, "min": peak - rank, "median": peak, "max": peak + 5}
        for rank in range(2)
    ]
    over = {str(n): [(7 * MIB + state) // n, state // n] for n in (1, 2, 4)}
    extra = {
        "parameters": MIB,
        "peaks": peaks,
        "peak_rank": 1,
        "first_step_peak": peak - MIB,
        "optimizer_state_bytes": state,
        "owners": {**OWNERS, "state": state},
        "estimate": {"model_states": 7 * MIB + state, "peak": peak},
        "model_states_over_ranks": over,
        "reconciliation": [
            line("model states", ("estimated", "accounted"), 100, 100),
            line("peak", ("estimated", "measured"), 90, 100, cause="by activations"),
        ],
    }
    fields = {"stage": 1, "ranks": 2, "dtype": "bf16", "peak_bytes": peak, "peak_kind": "live tensors"}
    fields |= {"state_bytes_per_param": 2 * state / MIB, "model_state_bytes": 7 * MIB + state, "extra": extra}
    return Row(kind="memory", optimizer=optimizer, **{**fields, **given})


def line(what: str, sides: tuple[str, str], left: int, right: int, cause: str = "") -> dict[str, Any]:
    entry = {"what": what, "sides": list(sides), "rank": 0, sides[0]: left, sides[1]: right, "cause": cause}
    return {**entry, "difference": left - right, "share": left / right - 1, "flagged": bool(cause)}


def test_savings_are_against_adamw_of_the_same_cell() -> None:
    rows = [row("adamw", 4 * MIB), row("lion", 2 * MIB, 38 * MIB), row("lion", MIB, stage=3), row("adamw", 0, ranks=8)]
    saved = [r.extra["saving"] for r in with_savings(rows)]
    assert saved[0] is None
    assert saved[2] is None, "AdamW did not run at stage 3"
    assert (saved[1]["optimizer state"], saved[1]["model states"], saved[1]["peak"]) == (2 * MIB, 2 * MIB, 2 * MIB)
    assert saved[1]["percent"] == pytest.approx({"optimizer state": 50, "model states": 200 / 11, "peak": 5})


def test_repeats_become_their_median_and_the_extremes_of_all_ranks() -> None:
    peaks = [40 * MIB, 42 * MIB, 50 * MIB]
    merged = merge_repeats([row("lion", MIB, peak, repeat=number) for number, peak in enumerate(peaks)])
    assert len(merged) == 1
    assert merged[0].peak_bytes == 42 * MIB
    assert merged[0].extra["peak_spread"] == {"min": 40 * MIB - 1, "max": 50 * MIB + 5}
    assert merged[0].extra["first_step_peak"] == 49 * MIB


def test_a_cell_of_which_a_repeat_failed_has_failed() -> None:
    failed = Row(kind="memory", optimizer="lion", stage=1, ranks=2, dtype="bf16", status="failed", reason="killed")
    assert [r.status for r in merge_repeats([row("lion", MIB), failed])] == ["failed"]


def test_dtypes_of_momentum_are_cells_of_their_own() -> None:
    rows = [row("lion", 2 * MIB, momentum_dtype="float32"), row("lion", MIB, momentum_dtype="int8")]
    assert [r.label for r in merge_repeats(rows)] == ["lion", "lion, int8"]


def test_the_report_is_one_page_with_its_plots_and_a_csv(tmp_path: Path) -> None:
    failed = Row(
        kind="memory", optimizer="muon", stage=1, ranks=2, dtype="bf16", status="failed", reason="out of memory"
    )
    rows = [row("adamw", 4 * MIB), row("lion", 2 * MIB), failed]
    report = render_memory(rows, RunInfo(title="Memory"), tmp_path)
    page = report.html.read_text()
    assert page.count("<svg") == 3, "stacked bars, the map over ranks, the saving over N"
    assert "failed: out of memory" in page
    assert "by activations" in page
    assert not re.search(r'<script|<link|src=|href="http|url\(http', page), "the page needs no other"
    markdown = report.markdown.read_text()
    for name in ("owners", "ranks", "saving"):
        assert f"plots/{name}.png" in markdown
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(each["optimizer"], each["status"]) for each in lines] == [
        ("adamw", "ok"), ("lion", "ok"), ("muon", "failed"),
    ]  # fmt: skip
    assert lines[1]["saved_percent_optimizer_state"] == "50.0"
    assert lines[1]["saved_optimizer_state"] == str(2 * MIB)
    assert lines[2]["peak_bytes"] == ""


def test_only_what_differs_by_more_than_two_percent_is_named(tmp_path: Path) -> None:
    table, causes = reconciliation([row("lion", MIB), row("adamw", MIB)])
    states, peak, cause = table.lines[0].cells[3:]
    assert (states.verdict, states.change) == ("", "0 %")
    assert (peak.verdict, peak.change) == ("worse", "−10 %")
    assert [line.cells[-1].text for line in table.lines] == [cause.text, "a"] == ["a", "a"]
    assert causes == ["Cause a: peak: by activations"], "a cause is said once"


def test_what_is_saved_of_the_peak_stands_first() -> None:
    (said,) = memory_answers(with_savings([row("adamw", 3 * MIB), row("lion", MIB, 38 * MIB)]))
    assert said.startswith(
        "ZeRO-1 against AdamW: lion saves 2.00 MiB of peak (5.0 %), 2.00 MiB of model states (20.0 %), 2.00 MiB of "
        "optimizer state (66.7 %). Of AdamW's peak 25% are model states"
    )
    assert memory_answers(with_savings([row("lion", MIB)])) == []


def test_reconciliation_takes_the_rank_that_lies_farthest_apart() -> None:
    class Rank:
        model_states = 100

        def peak(self, passes: Passes) -> int:
            return 200 + passes.most

    def measured(states: int, counted: int, held: int) -> Any:
        forward = SimpleNamespace(accounted={"activations": 50}, total=counted, measured=held)
        return SimpleNamespace(model_state_bytes=states, moments={"after forward": forward})

    estimate = MemoryEstimate(model=None, optimizer=None, zero=None, ranks=(Rank(), Rank()))  # type: ignore[arg-type]
    ranks = [measured(100, 1000, 1010), measured(104, 1000, 1100)]
    passes = Passes(kept=50, moments=(Moment(held=50, made=0),))
    found = reconcile(ranks, [250, 240], CellEstimate(memory=estimate, passes=passes))
    by_name = {entry["what"]: entry for entry in found}
    assert list(by_name) == ["model states", "activations", "peak", "after forward"]
    assert (by_name["model states"]["rank"], by_name["model states"]["difference"]) == (1, -4)
    assert by_name["model states"]["flagged"]
    assert not by_name["activations"]["flagged"]
    assert (by_name["peak"]["rank"], by_name["peak"]["difference"]) == (1, 10)
    assert by_name["after forward"]["share"] == pytest.approx(-100 / 1100)


def run_folder(folder: Path, rows: list[Row], **machine: str) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "results.jsonl", rows)
    info = RunInfo(title="Memory", command=f"ds-optim memory --out {folder.name}", machine={"GPU": "none", **machine})
    (folder / "run.json").write_text(info.model_dump_json())
    return folder


def test_runs_of_several_machines_become_one_report(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a", [row("adamw", 4 * MIB), row("lion", 2 * MIB)], Cores="2")
    second = run_folder(tmp_path / "b", [row("adamw", 4 * MIB, 80 * MIB), row("lion", 2 * MIB, 60 * MIB)], Cores="16")
    report = merge_runs([first, second], tmp_path / "both")
    rows = read_rows(tmp_path / "both" / "results.jsonl")
    assert [(r.run, r.optimizer) for r in rows] == [("a", "adamw"), ("a", "lion"), ("b", "adamw"), ("b", "lion")]
    page = report.markdown.read_text()
    assert "Cores (a): 2" in page
    assert "Cores (b): 16" in page
    assert page.count("GPU: none") == 1
    saved = {each["run"]: each["saved_peak"] for each in csv.DictReader((tmp_path / "both" / "results.csv").open())}
    assert saved == {"a": "0", "b": str(20 * MIB)}, "each run against its own AdamW"


def test_comparisons_of_two_runs_stay_apart(tmp_path: Path) -> None:
    """The same cell of two runs is no repeat, and AdamW of one is no baseline of the other."""
    fields = {"kind": "compare", "stage": 1, "ranks": 2, "dtype": "bf16", "train_loss": [3.0, 2.0]}
    folders = [
        run_folder(tmp_path / name, [Row(optimizer=o, val_loss=v * scale, **fields) for o, v in losses])
        for name, scale, losses in (
            ("a", 1, [("adamw", 2.0), ("lion", 1.0)]),
            ("b", 3, [("adamw", 2.0), ("lion", 3.0)]),
        )
    ]
    table = merge_runs(folders, tmp_path / "both").table
    assert [[cell.text for cell in line.cells[:4]] for line in table.lines] == [
        ["a", "adamw", "1", "2.000"], ["a", "lion", "1", "1.000"],
        ["b", "adamw", "1", "6.000"], ["b", "lion", "1", "9.000"],
    ]  # fmt: skip
    assert [line.cells[3].change for line in table.lines] == ["", "−1.000", "", "+3.000"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<svg") == 2, "the losses of each run"


def test_folders_that_cannot_be_merged_are_one_line(tmp_path: Path) -> None:
    memory = run_folder(tmp_path / "a", [row("adamw", MIB)])
    compared = run_folder(tmp_path / "b", [Row(kind="compare", optimizer="lion")])
    with pytest.raises(UserError, match="results of compare, memory: give folders of one kind"):
        merge_runs([memory, compared], tmp_path / "out")
    with pytest.raises(UserError, match=r"results\.jsonl is missing"):
        merge_runs([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(UserError, match="given twice"):
        merge_runs([memory, memory], tmp_path / "out")
