"""Reports: rows to a file and back, changes against the baseline, and one HTML file that needs no other."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds_optim.errors import UserError
from ds_optim.optimizers.registry import OPTIMIZERS
from ds_optim.report import (
    Row,
    RunInfo,
    append_row,
    build_table,
    describe_machine,
    failures,
    read_rows,
    to_markdown,
    to_rich,
    units,
    write_rows,
)
from ds_optim.report.blocks import to_terminal
from ds_optim.report.compare import (
    compare_answers,
    compare_plots,
    render_compare,
    table_spec,
    terminal_table,
)
from ds_optim.report.memory_plots import OWNER_COLOURS
from ds_optim.report.plots import Curves, colour_map, draw
from ds_optim.report.repeats import losses_by_seed, merge_repeats


def row(optimizer: str, stage: int = 1, **fields: object) -> Row:
    measured = {
        "val_loss": 2.0,
        "ms_per_step": 100.0,
        "state_bytes_per_param": 8.0,
        "model_state_bytes": 3 << 20,
        "train_loss": [3.0, 2.5, 2.0],
        "unigram_entropy": 3.3,
    }
    return Row.model_validate({"optimizer": optimizer, "stage": stage, **measured, **fields})


def failed(optimizer: str, stage: int, reason: str) -> Row:
    return Row(optimizer=optimizer, stage=stage, status="failed", reason=reason)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [row("adamw", extra={"bits": 8}, notes=["a note"]), failed("lion", 2, "rank 1: out of memory")]
    path = tmp_path / "results.jsonl"
    write_rows(path, rows[:1])
    append_row(path, rows[1])
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"optimizer": "lion", "speed": 3}', "line 2 is no results row (speed: Extra inputs"),
        ("{", "line 2 is no results row"),
        ("[]", "line 2 is no results row"),
        ('{"optimizer": "lion", "version": 99}', "line 2 has schema version 99; this reads 1"),
    ],
)
def test_a_broken_results_file_says_where(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(row("adamw").model_dump_json() + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_results_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give a results\.jsonl"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.significant(1234.5), "1,230"),
        (units.significant(0.012345), "0.0123"),
        (units.significant(99.96), "100"),
        (units.significant(float("nan")), "nan"),
        (units.significant(None), "—"),
        (units.size(0), "0 B"),
        (units.size(1536), "1.50 KiB"),
        (units.size(3 * 2**30), "3.00 GiB"),
        (units.milliseconds(9_994), "9,990 ms"),
        (units.milliseconds(12_340), "12.3 s"),
        (units.percent_change(90, 100), "−10 %"),
        (units.percent_change(104.2, 100), "+4.2 %"),
        (units.percent_change(100.01, 100), "0 %"),
        (units.percent_change(1, 0), "—"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_changes_are_against_adamw_of_the_same_stage() -> None:
    rows = [
        row("adamw", 1),
        row("lion", 1, val_loss=1.9, state_bytes_per_param=4.0),
        row("adamw", 3, val_loss=4.0),
        row("lion", 3, val_loss=5.0),
    ]
    table = build_table(rows, table_spec(rows))
    loss = table.titles.index("Val loss")
    state = table.titles.index("State B/param")
    # In nats; of one seed nothing is better or worse.
    assert [line.cells[loss].change for line in table.lines] == ["", "−0.100", "", "+1.000"]
    assert [line.cells[loss].verdict for line in table.lines] == ["", "", "", ""]
    assert [line.cells[state].change for line in table.lines] == ["", "−50 %", "", "0 %"]
    assert [line.cells[state].verdict for line in table.lines] == ["", "better", "", ""]
    assert [line.starts_group for line in table.lines] == [False, False, True, False]


@pytest.mark.parametrize(
    ("low", "high", "rounds", "change", "verdict"),
    [
        (80.0, 91.0, 5, "about −10 %", ""),
        (80.0, 90.9, 5, "−10 %", "better"),
        (80.0, 90.9, 4, "about −10 %", ""),  # busy minutes may have met those of the one and none of the other
        (None, None, 5, "about −10 %", ""),
    ],
)
def test_a_change_within_the_spread_or_of_few_rounds_is_about_so_much(
    low: float | None, high: float | None, rounds: int, change: str, verdict: str
) -> None:
    extra = {"repeats": rounds}
    rows = [
        row("adamw", ms_low=91.0, ms_high=120.0, extra=extra),
        row("lion", ms_per_step=90.0, ms_low=low, ms_high=high, extra=extra),
    ]
    cell = build_table(rows, table_spec(rows)).lines[1].cells[3]
    assert (cell.text, cell.change, cell.verdict) == ("90.0 ms", change, verdict)


def test_the_answer_stands_first_a_sentence_a_stage(tmp_path: Path) -> None:
    often, seeds = {"repeats": 5}, {"val_loss_by_seed": {"0": 2.0, "1": 2.1, "2": 1.9}}
    tuned = {"optimizer_params": {"lr": 3e-3}, "tuned": True}
    some = {"val_loss_by_seed": {"0": 2.1, "1": 2.3, "2": 1.8}}
    lion = {"ms_per_step": 95.0, "ms_low": 80.0, "ms_high": 105.0, "val_loss": 2.125, "model_state_bytes": 2 << 20}
    rows = [
        row("adamw", 1, ms_low=90.0, ms_high=110.0, steps=40, extra={**tuned, **often, **seeds}),
        row("lion", 1, **lion, extra={**often, **some}),
        row("muon", 1, ms_per_step=150.0, ms_low=140.0, ms_high=160.0, val_loss=1.5, extra=often),
        row("adamw", 3),
        failed("lion", 3, "no"),
    ]
    answers = compare_answers(rows)
    assert answers == [
        "ZeRO-1 against AdamW: lion: model states −33 %, time about −5.0 %, within the spread, loss about +0.125 "
        "nats, seeds disagree; muon: model states 0 %, time +50 %, loss −0.500 nats.",
        "Losses are of 3 seeds, 40 steps, each at its own learning rate: a smoke test, not a ranking.",
    ]
    same = compare_answers([rows[0], rows[1], rows[1].model_copy(update={"optimizer": "signum", "val_loss": None})])
    assert same[0] == (
        "ZeRO-1 against AdamW: model states −33 %, time about −5.0 %, within the spread for all; lion: loss about "
        "+0.125 nats, seeds disagree."
    )
    alone = compare_answers([row("adamw", 1), row("lion", 1, ms_per_step=95.0, ms_low=94.0, ms_high=96.0)])
    assert "time about −5.0 %, loss" in alone[0]
    assert "Losses are of one seed" in alone[1]
    assert "one pass over the cells" in alone[1]
    assert "--repeat 5 tells them from noise" in alone[1]
    report = render_compare(rows, RunInfo(title="t"), tmp_path)
    assert report.markdown.read_text().index("ZeRO-1 against AdamW") < report.markdown.read_text().index("Results")
    assert "0.003, — (tuned)" in report.markdown.read_text()
    assert compare_answers(rows[1:3]) == []


def test_a_terminal_of_80_columns_cuts_no_number() -> None:
    from rich.console import Console

    times = {"ms_per_step": 1234.5, "ms_low": 1200.0, "ms_high": 1300.0, "tokens_per_s": 12_345.0}
    rows = [row(name, peak_bytes=43 << 20, wire_bytes_per_step=3e6, **times) for name in ("adamw", "lion_muon")]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(to_rich(terminal_table(rows)))
    for text in ("lion_muon", "1,230 ms", "1,200 to 1,300", "3.00 MiB", "43.0 MiB", "2.000"):
        assert shown.get().count(text) >= (1 if text == "lion_muon" else 2), text
    assert "…" not in shown.get()


@pytest.mark.parametrize("width", [40, 80, 100, 120, 139, 200])
def test_a_table_that_is_too_wide_stands_on_end_a_block_a_stage(width: int) -> None:
    from rich.console import Console

    times = {"ms_per_step": 1234.5, "ms_low": 1200.0, "ms_high": 1300.0, "tokens_per_s": 12_345.0}
    rows = [row(name, stage, **times) for stage in (1, 3) for name in ("adamw", "lion_muon", "spectral_lion", "lion")]
    rows.append(failed("muon", 3, "no"))
    table = build_table(rows, table_spec(rows))
    console = Console(width=width)
    with console.capture() as shown:
        for part in to_terminal(table, "all", width):
            console.print(part)
    text = shown.get()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("12,345") == 8
    if width == 200:
        assert "failed" in text
    else:
        assert "Stage 1" in text.replace("\n", " ")
        assert "muon" not in text.replace("lion_muon", "")


def test_no_change_is_shown_where_the_baseline_failed() -> None:
    rows = [failed("adamw", 1, "no"), row("lion", 1)]
    table = build_table(rows, table_spec(rows))
    assert all(not cell.change for cell in table.lines[1].cells)


def test_unmeasured_columns_are_named_and_left_out() -> None:
    table = build_table([row("adamw")], table_spec([]))
    assert "Sent/rank/step" in table.unmeasured
    assert "Sent/rank/step" not in table.titles
    assert all(len(line.cells) == len(table.titles) for line in table.lines)


def test_failed_rows_say_why_in_every_format(tmp_path: Path) -> None:
    reason = "rank 1: RuntimeError: a <b> | c"
    rows = [row("adamw"), failed("lion", 1, reason)]
    table = build_table(rows, table_spec(rows))
    assert failures(table) == [f"lion, 1: {reason}"]
    markdown = to_markdown(table)
    assert reason.replace("<", "\\<").replace("|", "\\|") in markdown
    widths = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("| ")}
    assert widths == {len(table.titles) + 1}, "every line of the table has every column"
    report = render_compare(rows, RunInfo(title="t"), tmp_path)
    assert "a &lt;b&gt; | c" in report.html.read_text()
    assert to_rich(table).row_count == 2


class _Assets(HTMLParser):
    """What a page would load, and which of its tags never close."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "data")]
        if tag in ("link", "script", "iframe", "img"):
            self.loaded.append(tag)
        if tag not in ("meta", "link", "img", "br", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_html_needs_no_other_file(tmp_path: Path) -> None:
    rows = [
        row("adamw", 1, notes=["special"]),
        row("lion", 1, state_bytes_per_param=4.0),
        row("adamw", 3),
        failed("lion", 3, "no"),
    ]
    info = RunInfo(title="A & B", command="ds-optim compare", machine={"CPU": "x"}, settings={"Model": "y"})
    report = render_compare(rows, info, tmp_path)
    html = report.html.read_text()
    page = _Assets()
    page.feed(html)
    assert page.loaded == []
    assert page.open == []
    assert html.count("<svg") == 4, "loss at two stages, time, model states"
    assert "currentColor" in html
    assert not re.search(r"url\((?!#)|@import", html), "nothing is fetched by the style sheet"
    assert "prefers-color-scheme: dark" in html
    for expected in ("A &amp; B", "ds-optim compare", "special", "unigram entropy", "−50 %"):
        assert expected in html
    for plot in re.findall(r"\]\((plots/[^)]+)\)", report.markdown.read_text()):
        assert (tmp_path / plot).read_bytes()[:4] == b"\x89PNG"


def test_plots_are_the_same_twice(tmp_path: Path) -> None:
    plots = compare_plots([row("adamw"), row("lion")])
    colours = colour_map(["adamw", "lion"])
    assert draw(plots[0], tmp_path, colours) == draw(plots[0], tmp_path, colours)
    assert len(set(colours.values())) == 2


def test_curves_of_stages_that_are_the_same_are_drawn_once() -> None:
    off = [3.0, 2.5, 2.25]
    rows = [row(name, stage) for stage in (1, 2) for name in ("adamw", "lion")]
    rows += [row("adamw", 3), row("lion", 3, train_loss=off, extra={"tokens_per_step": 512})]
    curves = [plot for plot in compare_plots(rows) if isinstance(plot, Curves)]
    assert [plot.title for plot in curves] == [
        "Training loss, ZeRO-1; ZeRO-2 within 0.02 nats of it", "Training loss, ZeRO-3",
    ]  # fmt: skip
    assert curves[0].x_label == "step"
    for each in rows:
        each.extra["tokens_per_step"] = 512
    assert [plot.x_label for plot in compare_plots(rows) if isinstance(plot, Curves)] == ["tokens", "tokens"]
    assert [*compare_plots(rows)[1].series["lion"][0]] == [512, 1024, 1536]  # type: ignore[attr-defined]


def test_an_optimizer_has_its_colour_in_every_report() -> None:
    alone, many = colour_map(["muon"]), colour_map(["adamw", "lion", "Muon, int8", "lion_muon"])
    assert alone["muon"] == many["Muon, int8"]
    assert len(set(many.values())) == len(many)
    assert colour_map(["lion"])["lion"] == many["lion"]
    every = colour_map([*OPTIMIZERS, "adamw", "deepspeed:Muon", "a user's", "another"])
    assert all(every[name] == colour_map([name])[name] for name in OPTIMIZERS)
    assert len(set(every.values())) >= len(OPTIMIZERS) + 2
    assert every["deepspeed:Muon"] not in (every["Muon"], every["adamw"])
    twice = colour_map(["lion, bfloat16", "lion, int8"])
    assert twice["lion, bfloat16"] == many["lion"] != twice["lion, int8"], "paler, where both are shown"
    assert not {*OWNER_COLOURS.values()} & {*every.values()}, "a part of memory is no optimizer"


def test_repeats_become_one_row() -> None:
    repeats = [
        row("lion", repeat=i, seed=4 + i, ms_per_step=ms, tokens_per_s=1e5 / ms, val_loss=loss, train_loss=[loss, 1.0])
        for i, (ms, loss) in enumerate([(100.0, 2.5), (90.0, 2.25), (140.0, 2.0)])
    ]
    (merged,) = merge_repeats(repeats)
    assert (merged.ms_per_step, merged.ms_low, merged.ms_high) == (100.0, 90.0, 140.0)
    assert (merged.val_loss, merged.train_loss) == (2.25, [2.25, 1.0])
    assert losses_by_seed(merged) == {"4": 2.5, "5": 2.25, "6": 2.0}
    table = build_table([merged], table_spec([merged]))
    assert table.lines[0].cells[table.titles.index("Val loss")].detail == "2.000 to 2.500"
    assert merged.tokens_per_s == 1000.0
    assert merged.extra["repeats"] == 3
    (broken,) = merge_repeats([*repeats, failed("lion", 1, "no").model_copy(update={"repeat": 3})])
    assert broken.status == "failed"


def test_machine_description_names_no_host_and_no_path() -> None:
    import os
    import socket

    described = describe_machine()
    assert {"CPU", "Cores", "GPU", "Python", "torch", "deepspeed"} <= set(described)
    text = " ".join(described.values())
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
