"""What an exchange is planned from: bounded scratch, buckets to overlap, owners by cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR, SIGN_POLAR, WEIGHT_BASIS
from ds_optim.sharding import plan as plans
from ds_optim.sharding.held import peak_scratch
from ds_optim.sharding.layout import Layout, ParamSpec, Unit, build_layout
from ds_optim.sharding.plan import ExchangePlan

from ..plans import MIB, views_of

STANDARD = PolarSpec(method="standard", dtype="bfloat16", gram_from=2.0)
METHODS = ("standard", "gram", "auto", "svd")


def plan_of(unit: Unit, **given: object) -> ExchangePlan:
    plain = ExchangePlan(
        unit=unit, views=views_of(unit), shape=POLAR, polar=STANDARD, bucket_mb=256, overlap=True, stacked=False
    )
    return replace(plain, **given)  # type: ignore[arg-type]


def layout_of(shapes: list[tuple[int, int]], stage: int, ranks: int) -> Layout:
    specs = [ParamSpec(name=f"w{number}", shape=shape) for number, shape in enumerate(shapes)]
    return build_layout([specs], stage=stage, world_size=ranks)


sides = st.integers(1, 40)
settings_of_plans = st.builds(
    dict,
    shape=st.sampled_from([POLAR, SIGN_POLAR, WEIGHT_BASIS, replace(POLAR, rows=True)]),
    polar=st.builds(
        PolarSpec,
        method=st.sampled_from(METHODS),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        gram_from=st.just(2.0),
    ),
    bucket_mb=st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]),
    overlap=st.booleans(),
    stacked=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=12),
    st.sampled_from([0, 1, 2, 3]),
    st.integers(1, 6),
    settings_of_plans,
    st.booleans(),
)
def test_scratch_is_bounded_by_the_bucket_or_the_largest_matrix(
    shapes: list[tuple[int, int]], stage: int, ranks: int, given: dict[str, object], transpose: bool
) -> None:
    (unit,) = layout_of(shapes, stage, ranks).units
    plan = plan_of(unit, views=views_of(unit, transpose), **given)
    c = plan.held_per_element
    rounding = c * len(shapes) if stage == 3 else 0  # a slice is an N-th of its parameter, rounded up
    bound = max(plan.bucket_mb * MIB, c * max(spec.numel for spec in unit.params)) + rounding
    for rank in range(unit.world_size):
        assert peak_scratch(plan, rank) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_the_multiple_of_the_largest_matrix(method: str) -> None:
    """Bytes an element of a square matrix in bf16: three buckets of messages, stacks, results and temporaries."""
    unit = layout_of([(64, 64)], 3, 4).units[0]
    plan = plan_of(unit, polar=replace(STANDARD, method=method))
    temporaries = POLAR.scratch(64, 64, plan.polar) / 64**2
    assert plan.held_per_element == 2 * (3 * 2) + 2 + 2 * 2 + temporaries
    assert replace(plan, overlap=False).held_per_element == 3 * 2 + 2 + temporaries


def test_what_is_overlapped_has_several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_LEAST_BUCKET", 32 * 32)
    unit = layout_of([(32, 32)] * 16, 3, 2).units[0]
    assert len(plan_of(unit).buckets) == 4
    assert len(plan_of(unit, overlap=False).buckets) == 1
    few = layout_of([(32, 32)] * 4, 3, 2).units[0]
    assert len(plan_of(few).buckets) == 2, "smaller messages than these are not made"
    whole = layout_of([(32, 32)] * 16, 1, 2).units[0]
    assert [len(batches) for batches in plan_of(whole).whole] == [1, 1], "batches stay large"


def test_owners_are_chosen_by_measured_costs() -> None:
    unit = layout_of([(64, 64), (8, 8), (8, 8), (8, 8)], 3, 2).units[0]
    counted = plan_of(unit)
    assert sorted(len([p for b in counted.buckets for p in b.owned[rank]]) for rank in range(2)) == [1, 3]
    costs = {(64, 64): 2.0, (8, 8): 2.0}
    timed = plan_of(unit, timed=costs)
    assert [len([p for b in timed.buckets for p in b.owned[rank]]) for rank in range(2)] == [2, 2]
    assert timed.loads == [4.0, 4.0]
