"""The benchmarks' parts: turns, limits, ratios, the stored dispatch table, and words on what was not measured."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ds_optim.bench import elementwise, polar, polar_table, ranks, step, tables, wire
from ds_optim.bench.answers import answers
from ds_optim.bench.engines import CASES, ModelShape, train_step
from ds_optim.bench.fused_adamw import op_is_built
from ds_optim.bench.limits import Limits, measure_limits
from ds_optim.bench.output import remarks
from ds_optim.bench.timing import Case, NotMeasured, Times, ratio, take_turns
from ds_optim.bench.trace import Overlap, overlap_of
from ds_optim.cli.app import main
from ds_optim.matrix import dispatch
from ds_optim.report import Row, build_table, to_markdown
from ds_optim.report.plots import colour_map

CPU = torch.device("cpu")
STAMP = {"machine": {"CPU": "one"}, "date": "2026-01-01"}


def test_cases_take_turns_and_a_failing_one_has_its_reason() -> None:
    calls: list[str] = []

    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    slow = [Case(name=n, run=lambda n=n: (calls.append(n), torch.randn(1 << 20))) for n in "ab"]  # type: ignore[misc]
    found = take_turns([slow[0], Case(name="bad", run=fail), slow[1]], CPU, 3)
    assert list(found) == ["a", "bad", "b"]
    assert found["bad"] == NotMeasured(reason="RuntimeError: out of memory")
    turns = "".join(name for name, after in zip(calls[4:], [*calls[5:], ""], strict=True) if name != after)
    assert turns == "ababab", "after two calls each, one sample a turn"
    a, b = found["a"], found["b"]
    assert isinstance(a, Times)
    assert isinstance(b, Times)
    assert len(a.samples) == 3
    assert a.quartiles[0] <= a.median <= a.quartiles[1]
    assert ratio(a, b) == round(statistics.median(a.samples) / statistics.median(b.samples), 3)
    assert ratio(a, found["bad"]) is None


@pytest.mark.full
def test_what_prepares_a_sample_is_not_timed() -> None:
    pause = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: torch.randn(1 << 22).sort())
    found = take_turns([Case(name="a", run=lambda: None, prepare=pause)], CPU, 2)["a"]
    assert isinstance(found, Times)
    assert found.median < 0.1


def test_limits_are_positive_and_say_what_would_take_too_long() -> None:
    limits = measure_limits(CPU, dtypes=("fp32", "bf16"), sizes=(64, 32), copy_bytes=1 << 20)
    assert limits.copy_gb_s > 0
    assert {dtype: sorted(rates) for dtype, rates in limits.matrix_tflops.items()} == {
        "fp32": [32, 64],
        "bf16": [32, 64],
    }
    assert min(rate for rates in limits.matrix_tflops.values() for rate in rates.values()) > 0
    assert limits.matrix_rate("fp32") == max(limits.matrix_tflops["fp32"].values())
    assert limits.matrix_rate("fp16") is None
    held = measure_limits(CPU, dtypes=("fp32",), sizes=(64,), copy_bytes=1 << 20, hold=0.02)
    assert 0 < held.matrix_tflops["fp32"][64] <= 2 * limits.matrix_tflops["fp32"][64], "a mean, not a sum"
    hurried = measure_limits(CPU, dtypes=("fp32",), sizes=(32, 4096), copy_bytes=1 << 20, seconds=1e-3)
    assert list(hurried.matrix_tflops["fp32"]) == [32]
    assert hurried.not_measured["fp32 4096"].startswith("would take about")


def test_operations_become_milliseconds_by_the_best_rate() -> None:
    limits = Limits(copy_gb_s=1.0, matrix_tflops={"bf16": {512: 0.5, 1024: 2.0}})
    assert limits.milliseconds("bf16", 4e12) == 2000.0
    assert limits.milliseconds("fp16", 1.0) is None


def polar_settings(**given: Any) -> polar.PolarSettings:
    tiny: dict[str, Any] = {
        "device": CPU, "shapes": ((16, 48),), "max_elements": 1 << 12, "dtypes": ("fp32",), "rounds": 3,
        "compiled": False, "matrix_sizes": (32,), "copy_bytes": 1 << 20,
    }  # fmt: skip
    return polar.PolarSettings(**{**tiny, **given})


@pytest.mark.full
def test_polar_rows_have_ratios_of_their_medians() -> None:
    rows = list(polar.rows(polar_settings(schedules=("keller", "you")), STAMP))
    assert [row.optimizer for row in rows] == [
        "keller, standard", "you, standard", "keller, gram", "you, gram", "DeepSpeed, eager",
    ]  # fmt: skip
    reference = rows[-1].ms_per_step
    assert reference is not None
    for row in rows:
        assert row.ms_per_step is not None
        assert row.extra["shape"] == "16x48"
        assert row.extra["machine"] == STAMP["machine"]
        assert row.extra["ratios"]["time / DeepSpeed, eager"] == pytest.approx(row.ms_per_step / reference, rel=0.02)
        assert row.extra["ratios"]["time / DeepSpeed"] is None
        assert row.extra["tflops"] == pytest.approx(row.extra["operations"] / row.ms_per_step / 1e9, rel=0.02)
        assert row.extra["operations"] == row.extra["operations_as_whole"], "16 rows are not cut"
        assert row.extra["tflops_as_whole"] == row.extra["tflops"]
        best = max(row.extra["limits"]["matrix_tflops"][row.dtype].values())
        assert row.extra["ratios"]["rate / matrix rate"] == pytest.approx(
            row.extra["tflops"] / best, rel=0.02, abs=1e-3
        )
    assert [row.extra["auto"] for row in rows[:-1]] == [False, False, True, True]


def test_rates_are_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "default_strips", lambda device, dtype: ((64, 2),))
    settings = polar_settings(shapes=((64, 96),), max_elements=1 << 13)
    standard, gram, theirs = polar.rows(settings, STAMP)
    assert (standard.extra["strips"], gram.extra["strips"]) == (2, 2)
    square, cube = 64**2 * 96, 64**3
    assert standard.extra["operations"] == 17.5 * square + 7.5 * cube
    assert standard.extra["operations_as_whole"] == 20 * square + 10 * cube
    assert gram.extra["operations"] == 10.5 * square + 16.5 * cube
    assert theirs.extra["operations"] == theirs.extra["operations_as_whole"] == 8 * square + 28 * cube
    for row in (standard, gram):
        done = row.extra["operations"] / row.extra["operations_as_whole"]
        assert row.extra["tflops"] / row.extra["tflops_as_whole"] == pytest.approx(done, rel=2e-3)


def test_deepspeeds_routine_is_what_we_say_it_is() -> None:
    (job,) = polar.deepspeed_jobs(16, 48, polar_settings())
    ours = polar._own(16, 48, polar.PolarSpec(method="gram", dtype="float32"), CPU)
    theirs = job.made()()
    assert isinstance(theirs, torch.Tensor)
    difference = torch.linalg.matrix_norm(theirs.float() - ours().squeeze(0))  # type: ignore[attr-defined]
    assert difference / 4 < 0.02, "keller, five steps, on the same matrix, whose polar factor has norm 4"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_elements": 16 * 47}, "more than --max-elements 752"),
        ({"device": torch.device("cuda"), "missing": "this machine has no CUDA device"}, "has no CUDA device"),
    ],
)
def test_a_shape_that_is_left_out_says_so(given: dict[str, Any], reason: str) -> None:
    (row,) = polar.rows(polar_settings(**given), STAMP)
    assert row.ms_per_step is None
    assert reason in row.extra["not_measured"]
    assert "not measured" in to_markdown(build_table([row], tables.POLAR))
    assert remarks([row]) == [f"16x48 every routine: not measured: {row.extra['not_measured']}"]


def test_a_case_that_the_matrix_rate_cannot_finish_is_left_out() -> None:
    rows = list(polar.rows(polar_settings(seconds=1e-9), STAMP))
    assert all("more than --seconds 1e-09" in row.extra["not_measured"] for row in rows)


@pytest.mark.parametrize(
    ("ratios", "aspect"),
    [
        ([(1.0, 1.2), (2.0, 0.8)], 1.5),
        ([(1.0, 1.2), (2.0, 0.9), (3.0, 1.1), (4.0, 0.9)], 3.5),
        ([(1.0, 0.9), (2.0, 0.8)], 0.0),
        ([(1.0, 0.9), (2.0, 1.0)], math.inf),
    ],
)
def test_the_crossing_is_read_between_points(ratios: list[tuple[float, float]], aspect: float) -> None:
    assert polar_table.crossing(ratios) == pytest.approx(aspect)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_measured_table_is_read_back(cache: Path) -> None:
    assert dispatch.gram_from(CPU, "float32") is None
    lines = list(polar_table.measure_and_store(polar_settings(max_elements=64 * 64 * 2), short_sides=(64,)))
    assert lines[-1] == f"stored: {cache / 'polar.json'}"
    found = dispatch.gram_from(CPU, "float32")
    assert found is not None
    assert found == 0.0 or 1.0 <= found <= 2.0 or found == math.inf
    assert dispatch.gram_from(CPU, "bfloat16") is None
    assert dispatch.strips(CPU, "float32") == (), "no side of those that are tried is so small"
    assert lines[-2] == "fp32: strips of symmetric products: none"


def test_measured_strips_are_stored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar_table, "STRIP_SIDES", {"cpu": (32, 64, 128)})
    wins = [{1: 1.0}, {1: 1.0, 2: 0.8}, {1: 1.0, 2: 0.79, 4: 0.5}]
    tried: list[list[str]] = []

    def fixed(cases: list[Case], device: torch.device, rounds: int) -> dict[str, Times]:
        for case in cases:
            case.run()
        if cases[0].name == "gram":
            return {case.name: Times(samples=(1.0, 1.0)) for case in cases}
        tried.append([case.name for case in cases])
        return {case.name: Times(samples=(wins[len(tried) - 1][int(case.name)],) * 2) for case in cases}

    monkeypatch.setattr(polar_table, "take_turns", fixed)
    lines = list(polar_table.measure_and_store(polar_settings(max_elements=128 * 128), short_sides=(64,)))
    assert tried == [["1"], ["1", "2"], ["1", "2", "4"]], "each cut once"
    assert dispatch.strips(CPU, "float32") == ((64, 2), (128, 4))
    assert "fp32: strips of symmetric products: 2 from 64, 4 from 128" in lines


@pytest.mark.parametrize(
    ("medians", "strips"),
    [({1: 1.0}, 1), ({1: 1.0, 2: 0.99}, 1), ({1: 1.0, 2: 0.9, 4: 0.895, 8: 0.8}, 8), ({2: 1.0, 4: 1.1}, 2), ({}, 1)],
)
def test_fewer_strips_go_first(medians: dict[int, float], strips: int) -> None:
    assert polar_table.fewest(medians) == strips


def test_storing_keeps_what_else_is_there_and_leaves_no_scraps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(dispatch, "device_name", lambda device: "another")
        dispatch.store(CPU, {"float32": {"gram_from": 3.0}})
    dispatch.store(CPU, {"float32": {"gram_from": 1.5}, "bfloat16": {"gram_from": None}})
    path = dispatch.store(CPU, {"float32": {"gram_from": 1.25}})
    assert dispatch.gram_from(CPU, "float32") == 1.25
    assert dispatch.gram_from(CPU, "bfloat16") == math.inf
    monkeypatch.setattr(dispatch, "device_name", lambda device: "another")
    assert dispatch.gram_from(CPU, "float32") == 3.0
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "devices": {}}', '{"version": 2, "devices": []}'])
def test_a_damaged_table_counts_as_none(cache: Path, text: str) -> None:
    path = dispatch.table_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert dispatch.gram_from(CPU, "float32") is None
    dispatch.store(CPU, {"float32": {"gram_from": 2.0}})
    assert dispatch.gram_from(CPU, "float32") == 2.0


def test_no_table_from_too_few_elements(cache: Path) -> None:
    lines = list(polar_table.measure_and_store(polar_settings(max_elements=100), short_sides=(64,)))
    assert lines == ["fp32: not stored: --max-elements 100 leaves no shape; write 8192 or more", "no table was stored"]
    assert not cache.exists()


@pytest.mark.full
def test_elementwise_rows_have_ratios_of_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_NATIVE", "1")
    settings = elementwise.ElementwiseSettings(device=CPU, elements=4096 + 37, rounds=3)
    rows = {(row.optimizer, row.extra["path"]): row for row in elementwise.rows(settings, STAMP)}
    assert os.environ["DS_OPTIM_NATIVE"] == "1"
    adamw, copy = rows["torch AdamW, fused", None], rows["copy", None]
    assert adamw.ms_per_step is not None
    for dtype, width in (("float32", 20), ("bfloat16", 16), ("int8", 14.03125)):
        for path in ("compiled", "eager"):
            row = rows[f"sign step, {dtype} momentum", path]
            if row.extra.get("not_measured"):
                assert path == "compiled"
                continue
            assert row.ms_per_step is not None
            assert row.extra["bytes_per_element"] == width
            assert row.extra["gb_s"] == pytest.approx(width * settings.elements / row.ms_per_step / 1e6, rel=0.02)
            ratios = row.extra["ratios"]
            assert ratios["time / torch AdamW"] == pytest.approx(
                row.ms_per_step / adamw.ms_per_step, rel=0.05, abs=1e-3
            )
            limit = row.extra["gb_s"] / copy.extra["gb_s"]
            assert ratios["rate / copy rate"] == pytest.approx(limit, rel=0.02, abs=1e-3)
    assert copy.extra["ratios"]["rate / copy rate"] == pytest.approx(1.0, abs=1e-3)
    assert {"blend into bfloat16", "apply bfloat16"} <= {name for name, _ in rows}


def test_each_path_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_NATIVE", "1")
    elementwise.choose(elementwise.EAGER)
    p, m, g = torch.zeros(256), torch.zeros(256), torch.ones(256)
    assert not elementwise.native.sign_step(p, m, g, (0.9, 0.1, 0.99, 0.01), 0.0, 1.0)
    compiled = elementwise.no_compiled_path(CPU) is None
    assert elementwise.native.sign_step(p, m, g, (0.9, 0.1, 0.99, 0.01), 0.0, 1.0) == compiled


def test_without_a_device_every_pass_says_so() -> None:
    settings = elementwise.ElementwiseSettings(device=torch.device("cuda"), missing="this machine has no CUDA device")
    rows = list(elementwise.rows(settings, STAMP))
    assert len(rows) == len(list(elementwise.all_passes()))
    assert {row.extra["not_measured"] for row in rows} == {"this machine has no CUDA device"}


def test_an_op_of_deepspeed_that_is_not_built_is_not_built_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not op_is_built("cpu_adam")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert op_is_built("cpu_adam")


def test_a_step_accumulates_over_the_micro_batches_of_its_tokens() -> None:
    engine, seen = mock.MagicMock(**{"gradient_accumulation_steps.return_value": 2}), []
    engine.side_effect = lambda input_ids, labels: seen.append(input_ids) or mock.MagicMock()
    tokens = torch.arange(12).view(4, 3)
    train_step(engine, tokens)
    assert [part.tolist() for part in seen] == [tokens[:2].tolist(), tokens[2:].tolist()]
    assert engine.backward.call_count == engine.step.call_count == 2


def step_rows(by_rank: list[step.RankTimes], cases: tuple[str, ...]) -> dict[str, Row]:
    settings = step.StepSettings(ranks=2, stages=(1,), cases=cases, shape=ModelShape(), rounds=1)
    return {row.optimizer: row for row in step.stage_rows(1, by_rank, settings, STAMP)}


def test_of_each_step_the_slowest_rank_counts() -> None:
    limits = Limits(copy_gb_s=1.0, matrix_tflops={"bf16": {64: 1e-3}})
    work = {"AdamW": (1e6, 0.0), "Muon": (1e6, 1e6)}
    missing = {"Lion": "no such thing here"}
    by_rank = [
        step.RankTimes(
            overlap={"AdamW": Overlap(messages_ms=0, covered_ms=0), "Muon": Overlap(messages_ms=2, covered_ms=slow)},
            whole={"AdamW": [0.010, 0.010, 0.010], "Muon": [0.010 * slow, 0.030, 0.010]},
            step={"AdamW": [0.002, 0.002, 0.002], "Muon": [0.004, 0.004, 0.001 * slow]},
            limits=limits, missing=missing, least_work=work,
        )
        for slow in (1, 2)
    ]  # fmt: skip
    rows = step_rows(by_rank, ("AdamW", "Muon", "Lion"))
    assert rows["Muon"].ms_per_step == 20.0
    assert rows["Muon"].extra["optimizer_ms"] == 4.0
    assert rows["Muon"].extra["ratios"] == {
        "step / AdamW": 2.0, "step / deepspeed:Muon": None,
        "optimizer / AdamW": 2.0, "optimizer / deepspeed:Muon": None, "optimizer / limit": 2.0,
        "step at the limit / AdamW": 1.1,  # 1 ms of products beyond AdamW's bytes, of its 10 ms
    }  # fmt: skip
    assert rows["Muon"].extra["overlap"] == 0.75
    assert rows["AdamW"].extra["overlap"] is None
    assert rows["AdamW"].extra["ratios"]["optimizer / limit"] == 2.0
    assert rows["Lion"].ms_per_step is None
    assert rows["Lion"].notes == ["not measured: no such thing here"]


@pytest.mark.full
def test_the_least_work_of_a_step_is_in_bytes_and_products() -> None:
    shape = ModelShape(width=32, layers=1, vocabulary=64)
    numel = sum(parameter.numel() for parameter in step.engines.qwen3(shape).parameters())
    assert step.least_work("AdamW", shape, 2, CPU) == (14 * numel, 0.0)
    assert step.least_work("Lion", shape, 2, CPU) == (10 * numel, 0.0)
    muon, every_second = (step.least_work(case, shape, 2, CPU) for case in ("Muon", "LionMuon"))
    assert muon[1] == 2 * every_second[1] > 0
    assert CASES["LionMuon"]["params"]["period"] == 2


def timed(optimizer: str, low: float, middle: float, high: float, **fields: Any) -> Row:
    row = Row(kind="step_time", optimizer=optimizer, stage=1, ms_low=low, ms_per_step=middle, ms_high=high)
    return row.model_copy(update=fields)


def test_what_came_out_is_said_first_and_with_about_where_quartiles_meet() -> None:
    rows = [timed("Muon", 11, 12, 13), timed("AdamW", 9, 10, 11), timed("Lion", 8, 8.4, 8.9), timed("One", 7, 7, 7)]
    rows.append(Row(kind="step_time", optimizer="Signum", stage=1, extra={"not_measured": "no memory"}))
    assert answers(rows) == [
        "ZeRO-1, time of a step against AdamW's: Muon about ×1.20, Lion ×0.840, One about ×0.700.",
        "1 of 5 cases were not measured; beneath the table stands why.",
    ]
    table = build_table(rows, tables.STEP)
    assert [(line.cells[2].change, line.cells[2].verdict) for line in table.lines] == [
        ("about ×1.20", ""), ("", ""), ("×0.840", "better"), ("about ×0.700", ""), ("", ""),
    ]  # fmt: skip
    assert answers(rows[:1]) == ["ZeRO-1: AdamW was not measured, and time of a step has no ratio to it."]
    assert answers(rows[-1:]) == ["Nothing was measured: no memory."]
    assert answers([]) == []


def test_the_fastest_of_ours_stands_against_deepspeeds_as_it_ships() -> None:
    shape = {"stage": None, "kind": "polar", "dtype": "bf16", "extra": {"shape": "8x8", "ratios": {}}}
    at_rate = {**shape, "extra": {"shape": "8x8", "ratios": {"rate / matrix rate": 0.5}}}
    rows = [timed("keller", 4, 5, 6, **shape), timed("you", 2, 3, 3.5, **at_rate)]
    rows += [timed("DeepSpeed", 7, 8, 9, **shape), timed("DeepSpeed, eager", 10, 12, 13, **shape)]
    said = "Time of our fastest orthogonalization against DeepSpeed's: 8x8 {} (you, bf16, 50 % of the matrix rate)."
    assert answers(rows) == [said.format("×0.375")]
    assert answers([*rows[:2], rows[3]]) == [said.format("×0.250")]
    assert answers(rows[:2]) == []
    drawn = tables.bars(rows)
    assert drawn is not None
    assert drawn.limits == {("8x8", "you, bf16"): 1.5}
    assert drawn.parts["you, bf16"] == colour_map(["muon"])["muon"]


def test_eager_passes_are_drawn_where_nothing_is_compiled() -> None:
    def a_pass(name: str, path: str | None, ms: float | None, what: str = "sign step") -> Row:
        extra = {"what": what, "path": path, "ratios": {"rate / in-place rate": 0.5}}
        return timed(name, 0, ms or 0, 1, kind="elementwise", stage=None, ms_per_step=ms, extra=extra)

    rows = [a_pass("copy", None, 1, "limits"), a_pass("torch AdamW, fused", None, 4), a_pass("both", "compiled", 2)]
    rows += [a_pass("both", "eager", 80), a_pass("one", "compiled", None), a_pass("one", "eager", 40)]
    drawn = tables.bars(rows)
    assert drawn is not None
    assert drawn.groups == {"sign step": [("torch AdamW, fused", 4), ("both", 2), ("one, eager", 40)]}
    assert drawn.limits["sign step", "one, eager"] == 20
    assert tables.bars(rows[:1]) is None


def test_bytes_on_the_wire_stand_beside_their_formula() -> None:
    adamw = {"handed": 100.0, "interface": 300.0, "planned": 0, "bytes_an_element": 0, "matrix_elements": 0}
    muon = {"handed": 140.0, "interface": 400.0, "planned": 50, "bytes_an_element": 4, "matrix_elements": 40}
    settings = wire.WireSettings(ranks=2, stages=(3,), cases=("AdamW", "Muon", "LionMuon"), shape=ModelShape())
    by_rank = [{"AdamW": adamw, "Muon": muon, "LionMuon": muon}] * 2
    rows = list(wire.stage_rows(3, by_rank, settings, True, STAMP))
    assert [row.extra["formula"] for row in rows] == [0, 40.0, 20.0]
    assert rows[1].extra["handed_ratio"] == 1.0
    assert rows[1].extra["interface_ratio"] == 1.25
    said = "ZeRO-3, bytes sent a step against AdamW's: Muon ×1.40, LionMuon ×1.40"
    assert answers(rows[:2]) == [
        f"{said.partition(', Lion')[0]}; of ours what is beyond it is the formula's within 0.010 %."
    ]
    assert answers(rows) == [f"{said}; of ours what is beyond it is the formula's within 100 %."]
    rows = list(wire.stage_rows(1, by_rank, settings, False, STAMP))
    assert [row.extra["formula"] for row in rows] == [0, 50.0, 25.0]
    assert "interface" not in rows[1].extra
    assert "not permitted" in rows[1].notes[0]


def test_ranks_that_fail_leave_rows_that_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ranks.RankFailedError("rank 1: out of memory")

    monkeypatch.setattr(ranks, "run", fail)
    monkeypatch.setattr(ranks, "private_network", lambda: ())
    cases, shape = ("AdamW", "Lion"), ModelShape()
    timed = list(step.rows(step.StepSettings(ranks=2, stages=(1, 3), cases=cases, shape=shape), STAMP))
    sent = list(wire.rows(wire.WireSettings(ranks=2, stages=(1, 3), cases=cases, shape=shape), STAMP))
    for rows, spec in ((timed, tables.STEP), (sent, tables.WIRE)):
        assert [(row.optimizer, row.stage) for row in rows] == [("AdamW", 1), ("Lion", 1), ("AdamW", 3), ("Lion", 3)]
        assert {row.extra["not_measured"] for row in rows} == {"rank 1: out of memory"}
        assert to_markdown(build_table(rows, spec)).count("not measured") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("step --stages 4", "--stages: unknown '4'; write one of 0, 1, 2, 3"),
        ("step --cases Lionn", "--cases: unknown 'Lionn'; did you mean 'Lion'?"),
        ("step --cases ,", "--cases: nothing is named"),
        ("step --ranks 0", "--ranks: 0 is too few; write 1 or more"),
        ("step --width 130", "--width: 130 cannot be cut into heads; write a multiple of 128, e.g. 128"),
        ("step --tokens 1", "--tokens: 1 is too few; write 2 or more"),
        ("step --tokens 1500", "--tokens: 1500 are no whole sequences; write a multiple of 1024"),
        ("step --tokens 3072 --accumulation 2", "--accumulation: 3072 tokens are 3 sequences; write a divisor"),
        ("step --accumulation 2", "--accumulation: 64 tokens are 1 sequences; write a divisor"),
        ("step --rounds 0", "--rounds"),
        ("wire --layers 0", "--layers: 0 is too few"),
        ("wire --ranks two", "'--ranks'"),
        ("polar --shapes 768", "--shapes: '768' is no shape; write rows x columns, e.g. 768x2304"),
        ("polar --shapes 0x5", "--shapes: '0x5' is no shape"),
        ("polar --dtypes bf61", "did you mean 'bf16'?"),
        ("polar --methods svd", "--methods: unknown 'svd'"),
        ("polar --schedules yuo", "did you mean 'you'?"),
        ("polar --rounds 1", "--rounds: 1 is too few; write 2 or more"),
        ("polar --seconds 0", "--seconds"),
        ("elementwise --elements 0", "--elements: 0 is too few; write 256 or more"),
        ("elementwise --device gpu", "--device: unknown 'gpu'"),
        ("elementwise --elements 256 --out /dev/null/x", "--out: cannot write /dev/null/x"),
        ("sped", "sped"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments.split(" ")])
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


def test_overlap_is_the_time_that_messages_and_work_share() -> None:
    def span(name: str, begin: float, end: float, cat: str) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "cat": cat}

    messages = [
        span("gloo:all_to_all", begin, end, "cpu_op") for begin, end in ((0, 4000), (3000, 6000), (9000, 10000))
    ]
    work = [span("ds_optim: solve", begin, end, "user_annotation") for begin, end in ((2000, 5000), (9500, 9600))]
    other = [span("gloo:all_gather", 0, 10000, "cpu_op"), span("ds_optim: land", 0, 10000, "user_annotation")]
    assert overlap_of([*messages, *work, *other, {"ph": "M"}]) == Overlap(messages_ms=7.0, covered_ms=3.1)
    nccl = span("ncclDevKernel_SendRecv(args)", 100, 300, "kernel")
    on_gpu = [nccl, span("ds_optim: solve", 200, 900, "gpu_user_annotation")]
    assert overlap_of([*messages, *work, *on_gpu]) == Overlap(messages_ms=0.2, covered_ms=0.1), "the device's own times"
    assert overlap_of(work) == Overlap(messages_ms=0, covered_ms=0)
