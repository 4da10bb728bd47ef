"""Measured costs: which number wins, what is kept, and what a run does where nothing can be measured or kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR, WEIGHT_BASIS, Shape
from ds_optim.optimizers import costs
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.sharding.plan import ExchangePlan

from ..plans import views_of

CPU = torch.device("cpu")
SIZES = [(16, 48), (32, 32)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_OPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs.json"


def plan(shape: Shape = POLAR, sizes: Sequence[tuple[int, int]] = SIZES) -> ExchangePlan:
    """Of a matrix of each size."""
    polar = PolarSpec(dtype="float32").resolve(CPU)
    (unit,) = build_layout([[ParamSpec(name=str(s), shape=s) for s in sizes]], stage=3, world_size=2).units
    return ExchangePlan(
        unit=unit, views=views_of(unit), shape=shape, polar=polar, bucket_mb=1, overlap=True, stacked=False
    )


def never(*args: object) -> float:
    raise AssertionError("measured although the number is known")


@pytest.mark.parametrize("shape", [POLAR, WEIGHT_BASIS])
def test_each_shape_is_timed_and_kept_for_the_next_run(
    shape: Shape, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_STARTS", 1)
    state = torch.random.get_rng_state()
    found = costs.measured([plan(shape)], CPU)
    assert torch.equal(state, torch.random.get_rng_state()), "the user's random numbers are not used"
    (job,) = found["jobs"]
    assert set(found["jobs"][job]) == {"16x48", "32x32"}
    assert min(found["jobs"][job].values()) > 0
    monkeypatch.setattr(costs, "_timed", never)
    assert costs.measured([plan(shape)], CPU) == found
    known = costs.costs_of(plan(shape), CPU, found)
    assert known is not None
    assert known[16, 48] == found["jobs"][job]["16x48"]


def clock(monkeypatch: pytest.MonkeyPatch, ms: float) -> list[tuple[int, int]]:
    """Every matrix takes so long; returns what is timed from here on."""
    timed: list[tuple[int, int]] = []

    def reading(plan: ExchangePlan, size: tuple[int, int], device: torch.device) -> float:
        timed.append(size)
        return ms

    monkeypatch.setattr(costs, "_timed", reading)
    return timed


@pytest.mark.parametrize("readings", [(90.0, 2.0, 3.0), (2.0, 90.0, 3.0), (3.0, 3.0, 2.0)])
def test_what_a_busy_machine_took_is_not_kept(
    readings: tuple[float, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts time a shape, and the smallest number of them stays."""
    for number, reading in enumerate(readings):
        clock(monkeypatch, reading)
        (found,) = costs.measured([plan()], CPU)["jobs"].values()
        assert set(found.values()) == {min(readings[: number + 1])}
    timed = clock(monkeypatch, 1.0)
    (found,) = costs.measured([plan()], CPU)["jobs"].values()
    assert (set(found.values()), timed) == ({2.0}, [])


def test_a_resumed_run_times_nothing_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 90.0)
    saved = costs.measured([plan()], CPU)
    timed = clock(monkeypatch, 1.0)
    assert costs.measured([plan()], CPU, saved) == saved
    assert timed == []


def test_a_checkpoints_numbers_come_first_on_the_device_they_are_of(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_STARTS", 1)
    own = costs.measured([plan()], CPU)
    (job,) = own["jobs"]
    saved = {"device": own["device"], "jobs": {job: {"16x48": 7.0, "32x32": 9.0}}}
    assert costs.measured([plan()], CPU, saved) == saved
    elsewhere = {**saved, "device": "another"}
    assert costs.measured([plan()], CPU, elsewhere) == own
    kept = {key: [cost, 1] for key, cost in own["jobs"][job].items()}
    assert json.loads(cache.read_text())["devices"][own["device"]] == {job: kept}, "not what a checkpoint brought"


def test_other_threads_and_other_coefficients_are_another_job(cache: Path) -> None:
    names = {costs.job_of(plan(), CPU)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        names.add(costs.job_of(plan(), CPU))
    finally:
        torch.set_num_threads(threads)
    names.add(costs.job_of(plan(WEIGHT_BASIS), CPU))
    assert len(names) == 3


def test_a_shape_that_cannot_be_timed_leaves_all_to_the_count(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def solve(parts: Sequence[torch.Tensor], spec: PolarSpec) -> Sequence[torch.Tensor]:
        if parts[0].shape[-1] == 48:
            raise RuntimeError("out of memory\nand more")
        return parts

    broken = replace(POLAR, name="broken", solve=solve)
    found = costs.measured([plan(broken)], CPU)
    assert "16x48 matrix could not be timed (out of memory)" in caplog.text
    assert "16x48 matrices were not timed: for theirs, operations are counted" in caplog.text
    assert costs.costs_of(plan(broken), CPU, found) is None
    assert costs.costs_of(plan(broken, [(32, 32)]), CPU, found) is not None


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"version": 99, "devices": {}}', '{"version": 3, "devices": {"%s": 3}}', "[" * 10**5, " " * 2**25],
    ids=["empty", "bare", "newer", "device", "deep", "large"],
)
def test_a_table_that_cannot_be_read_is_measured_anew(text: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir()
    cache.write_text(text.replace("%s", costs.device_name(CPU)))
    found = costs.measured([plan()], CPU)
    assert "cannot be read" in caplog.text
    assert len(*found["jobs"].values()) == 2


def test_a_run_goes_on_where_nothing_can_be_kept(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    found = costs.measured([plan()], CPU)
    assert len(*found["jobs"].values()) == 2
    assert "cannot be kept" in caplog.text


def test_what_is_left_after_a_minute_is_not_timed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(costs, "_PATIENCE_S", 0.0)
    found = costs.measured([plan()], CPU)
    assert found["jobs"] == {costs.job_of(plan(), CPU): {}}
    assert costs.costs_of(plan(), CPU, found) is None
    assert caplog.text.count("were not timed") == 2


NO_COSTS = ("-1.0", "0", "NaN", "Infinity", "1e-300", "1e300", "true", '"3"', "null", "[]")
NO_ENTRIES = ("3.0", "[3.0]", "[3.0, 1.5]", "{}")


@pytest.mark.parametrize("value", [*(f"[{value}, 3]" for value in NO_COSTS), *NO_ENTRIES])
def test_numbers_that_are_no_costs_are_measured_anew(value: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 2.0)
    own = costs.measured([plan()], CPU)
    (job,) = own["jobs"]
    table = json.loads(cache.read_text())
    table["devices"][own["device"]][job] = {"16x48": "VALUE", "32x32": [7.0, 3], "8x8": [3.0, 3]}
    cache.write_text(json.dumps(table).replace('"VALUE"', value))
    assert costs.measured([plan()], CPU)["jobs"][job] == {"16x48": 2.0, "32x32": 7.0}
    kept = json.loads(cache.read_text())["devices"][own["device"]][job]
    assert kept == {"16x48": [2.0, 1], "32x32": [7.0, 3], "8x8": [3.0, 3]}, "others' numbers stay"
