"""Every HTML page in a browser: on narrow and wide screens, light and dark, with the keyboard and without eyes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_optim.accept.checks import AcceptSettings, Check, within
from ds_optim.accept.run import write_report
from ds_optim.bench import output, tables
from ds_optim.memory.estimate_sources import load_shape
from ds_optim.memory.side_by_side import EstimateRequest
from ds_optim.report import Row, RunInfo, read_rows
from ds_optim.report.compare import render_compare
from ds_optim.report.estimate_page import write_page
from ds_optim.report.memory import render_memory
from ds_optim.report.plots import colour_map
from ds_optim.report.table import TableSpec
from tests.browser import NARROW, WIDE, colours_of, cut_off, opened, out_of_reach, pale_text, show, unnamed

pytestmark = pytest.mark.full

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"
INFO = RunInfo(
    title="Some of it",
    command=f"ds-optim compare --optimizers lion,muon --out {'a-long-name' * 9}",
    started="2026-11-22 10:10 UTC",
    machine={"CPU": "one with quite a long name, 2.50GHz", "torch": "2.13.0"},
    settings={"Model": "qwen3-tiny", "Tokens a micro-batch and rank": "1 x 256"},
)


def kept(name: str, count: int | None = None) -> list[Row]:
    """Rows as they were measured, and one that failed."""
    rows = read_rows(KEPT / f"{name}.jsonl")[:count]
    reason = f"rank 1: RuntimeError: {'no_room_for_one_long_word' * 4}, and more"
    failed = rows[-1].model_copy(update={"optimizer": "signum", "status": "failed", "reason": reason})
    return [*rows, failed]


def compare(folder: Path) -> None:
    rows = kept("two_minutes-2ranks-cpu-2026-11-22", 8)
    render_compare([row.model_copy(update={"train_loss": row.train_loss[::20]}) for row in rows], INFO, folder)


def memory(folder: Path) -> None:
    rows = kept("memory-2ranks-cpu-2026-11-22")
    # Of a node, so that the map is wider than a narrow screen.
    peaks = [{**rows[0].extra["peaks"][0], "rank": rank} for rank in range(8)]
    rows[0].extra["peaks"] = peaks
    render_memory(rows, INFO, folder)


def bench(name: str, spec: TableSpec, count: int | None = None) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        rows = kept(name, count)[:-1]
        missing = Row(
            kind=rows[0].kind, optimizer="Lion-like", stage=rows[0].stage, notes=["not measured: out of memory"]
        )
        missing.extra = {**rows[0].extra, "not_measured": "out of memory", "ratios": {}}
        output.write("A benchmark", [*rows, missing], spec, folder, INFO.command)

    return written


def accept(folder: Path) -> None:
    checks = {
        "kernels": [within(f"sign_step {n}", 0.3 * n, 4, where="bf16 weights, int8 momentum") for n in range(5)],
        "optimizers": [within("LionMuon", 0.0, 1e-3), Check(name="Muon", ok=False, note="rank 1: out of memory")],
        "wire": [within("LionMuon", 1.03, 1.02, where="stage 3")],
        "step": [Check(name="Lion", ok=True, figure=12.3, unit="ms", note="measured")],
    }
    rows = [check.row(part) for part, of in checks.items() for check in of]
    write_report(rows, AcceptSettings(gpus=0, ranks=2), list(checks), folder, {"Part kernels": "5 of 5 hold (3 s)"})


def estimate(folder: Path) -> None:
    request = EstimateRequest(
        model=load_shape("qwen3-tiny", None), optimizers=("lion", "lion_muon", "muon"), stages=(1, 3), ranks=(8,),
        seq_len=256,
    )  # fmt: skip
    write_page(request, folder / "report.html")


PAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "compare": (compare, r"ZeRO-2 against AdamW: lion: model states −22 %"),
    "memory": (memory, r"ZeRO-1 against AdamW: lion, muon, lion_muon save 2.00 MiB of peak"),
    "step": (
        bench("step_time-4ranks-cpu-2026-11-22", tables.STEP),
        r"ZeRO-3, time of a step against AdamW's: deepspeed:Muon ×1.68, Lion about ×1.00, Muon ×1.24",
    ),
    "wire": (
        bench("wire_bytes-2ranks-cpu-2026-11-22", tables.WIRE),
        r"ZeRO-1, bytes sent a step against AdamW's: deepspeed:Muon ×1.00",
    ),
    "polar": (
        bench("polar-2threads-cpu-2026-11-28", tables.POLAR, 8),
        r"Time of our fastest orthogonalization against DeepSpeed's: 768x768 ×0.416 .*72 % of the matrix rate",
    ),
    "elementwise": (
        bench("elementwise-2threads-cpu-2026-11-22", tables.ELEMENTWISE),
        r"Time of a pass against torch's fused AdamW: sign step, float32 momentum ×0.784 \(81 % of the in-place rate\)",
    ),
    "accept": (accept, r"7 of 9 hold; not: optimizers: Muon \(0 of 1\), wire: LionMuon \(0 of 1\)\.$"),
    "estimate": (estimate, r"ZeRO-3, 8 ranks, against adamw's"),
}


@pytest.fixture(scope="module", params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(browser: Any, name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(name)
    PAGES[name][0](folder)
    with opened(browser, folder / "report.html") as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_text_stands_out_and_nothing_is_cut_off(page: Any, width: int, scheme: str) -> None:
    show(page, width, scheme)
    assert cut_off(page) == []
    assert pale_text(page) == []
    backs = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (backs[0] == "rgb(255, 255, 255)") == (scheme == "light"), "the page itself is light, or dark"


def test_it_is_read_without_eyes_and_operated_without_a_mouse(page: Any) -> None:
    show(page, NARROW)
    assert unnamed(page) == []
    page.evaluate("document.activeElement.blur()")
    assert out_of_reach(page) == []


def test_what_came_out_stands_first_then_the_picture_the_table_and_how(page: Any, name: str) -> None:
    show(page, WIDE)
    first = page.evaluate("document.querySelector('.said')?.innerText ?? ''")
    assert re.match(PAGES[name][1], first), first
    places = ["h1", ".said", "figure svg, #bars", "table.results", "ul.notes", ".facts", "pre"]
    if name == "estimate":
        places = places[:5]
    tops = page.evaluate(
        "all => all.map(one => document.querySelector(one).getBoundingClientRect().top + scrollY)", places
    )
    assert tops == sorted(tops), dict(zip(places, tops, strict=True))


@pytest.mark.parametrize("name", ["compare", "step", "wire", "estimate"], indirect=True)
def test_an_optimizer_has_one_colour(page: Any) -> None:
    show(page, WIDE)
    for optimizer in ("adamw", "lion", "muon"):
        assert colours_of(page, optimizer) == [colour_map([optimizer])[optimizer]], optimizer


@pytest.mark.parametrize("name", ["step", "wire", "polar", "elementwise", "accept"], indirect=True)
def test_bars_stand_beside_their_limit(page: Any, name: str) -> None:
    legend = page.eval_on_selector_all("figure svg text", "texts => texts.map(text => text.textContent)")
    words = {"step": "machine's limit", "wire": "formula", "polar": "matrix rate", "elementwise": "in place"}
    assert any(words.get(name, "limit") in text for text in legend), legend
