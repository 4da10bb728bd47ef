"""The page of ``ds-optim estimate --html`` in a browser: its numbers and its controls; test_pages.py has the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_optim.cli.app import main
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_fit import fits, largest_micro_batch
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.grid import ranks_of
from ds_optim.memory.side_by_side import BASELINE, EstimateRequest
from ds_optim.report.estimate_page import write_page
from tests.browser import opened

pytestmark = pytest.mark.full

OPTIMIZERS = ("lion", "lion_muon", "nor_muon")
GIB = 2**30
OF_MEMORY = {
    "weights": lambda m: m.weights,
    "gradients": lambda m: m.gradients + m.accumulating,
    "master weights": lambda m: m.master,
    "optimizer state": lambda m: m.optimizer_state,
    "model states": lambda m: m.most_model_states,
}
AT_PEAK = {
    "gradients at the peak": "gradients",
    "buckets at the peak": "buckets",
    "gathered layers at the peak": "gathered",
    "logits at the peak": "logits",
    "activations at the peak": "activations",
    "scratch of the step at the peak": "step",
}


@pytest.fixture(scope="module")
def request_of_page() -> EstimateRequest:
    return EstimateRequest(model=load_shape("qwen3-tiny", None), optimizers=OPTIMIZERS, seq_len=256)


@pytest.fixture
def page(browser: Any, request_of_page: EstimateRequest, tmp_path: Path) -> Iterator[Any]:
    (path,) = write_page(request_of_page, tmp_path / "estimate.html")
    with opened(browser, path) as page:
        yield page


def shown(page: Any) -> dict[str, list[int]]:
    """By line of the table the numbers behind what it shows, a column each."""
    rows = page.eval_on_selector_all(
        "#lines tr", "lines => lines.map(tr => [...tr.children].map(td => td.dataset.value ?? td.textContent))"
    )
    return {name: [int(value) for value in values] for name, *values in rows}


def settings(request: EstimateRequest, count: int) -> list[dict[str, Any]]:
    draw = random.Random(20)
    return [
        {
            "stage": draw.choice(request.stages),
            "ranks": draw.choice(ranks_of(request)),
            "momentum": draw.choice(["float32", "bfloat16", "int8"]),
            "batch": draw.randint(1, 64),
            "gpu": draw.choice([1, 2, 3, 4, 8, 24, 80]),
        }
        for _ in range(count)
    ]


def by_python(request: EstimateRequest, at: dict[str, Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    passes = request.passes.at(at["batch"])
    for name in (BASELINE, *OPTIMIZERS):
        plan = request.plan(name, "float32" if name == BASELINE else at["momentum"])
        memory = estimate(request.held, plan, request.at(at["stage"], at["ranks"])).largest
        for line, of in OF_MEMORY.items():
            found.setdefault(line, []).append(of(memory))
        for line, owner in AT_PEAK.items():
            found.setdefault(line, []).append(memory.at_peak(passes).get(owner, 0))
        found.setdefault("peak", []).append(memory.peak(passes))
        largest = largest_micro_batch(memory, at["gpu"] * GIB, request.passes.at)
        found.setdefault("largest micro-batch", []).append(largest)
    return found


def test_numbers_are_pythons_at_fifty_settings(page: Any, request_of_page: EstimateRequest) -> None:
    for at in settings(request_of_page, 50):
        page.evaluate("at => { choose(at); show(); }", at)
        assert shown(page) == by_python(request_of_page, at), at


def test_what_fits_is_said(page: Any, request_of_page: EstimateRequest) -> None:
    seen = set()
    for at in settings(request_of_page, 12):
        page.evaluate("at => { choose(at); show(); }", at)
        memory = estimate(
            request_of_page.held, request_of_page.plan(BASELINE), request_of_page.at(at["stage"], at["ranks"])
        ).largest
        fitting = fits(memory, at["gpu"] * GIB, request_of_page.passes.at(at["batch"]))
        seen.add(fitting)
        said = page.inner_text("#said").partition(":")[0]
        assert said.endswith(f"which {'fits' if fitting else 'does not fit'} in {at['gpu']} GiB.".rstrip("."))
    assert seen == {True, False}


def test_controls_work_from_the_keyboard_and_the_address_keeps_them(page: Any) -> None:
    before = shown(page)
    page.focus("#batch")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#batch-said") == "2"
    assert shown(page)["activations at the peak"] != before["activations at the peak"]
    page.focus("input[name=stage]:checked")
    page.keyboard.press("ArrowLeft")
    assert "stage=2" in page.url
    page.select_option("#momentum", "int8")
    page.fill("#gpu", "24")
    kept, address = shown(page), page.url
    page.goto("about:blank")
    page.goto(address)
    assert shown(page) == kept
    assert page.input_value("#gpu") == "24"


def test_the_picture_shows_all_owners_and_says_what_the_sentence_does(page: Any) -> None:
    assert page.get_attribute("#bars", "aria-label") == page.inner_text("#said")
    assert page.eval_on_selector_all(".track", "tracks => tracks.every(t => t.children.length > 4)")


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "of" / "a model.html"
    given = [
        "estimate",
        "--params",
        "1e6",
        "--ranks",
        "2",
        "--stages",
        "1,3",
        "--optimizers",
        "lion",
        "--html",
        str(place),
    ]
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code in (0, None)
    assert f"written: {place}" in capsys.readouterr().out
    assert "<script" in place.read_text()
    with pytest.raises(SystemExit):
        main([*given[:-1], str(tmp_path)])
    assert "cannot write to --html" in capsys.readouterr().err
