"""Work grows with the number of tensors, not with its square: lines of the package that run are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.matrix.views import MatrixView
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Exchange
from ds_optim.sharding.layout import ParamSpec, build_layout
from ds_optim.sharding.lines import blocks_of
from ds_optim.zero.checkpoints.portable import Shards

from ..plans import plan_exchange

FEW, MANY = 30, 120
CASES = [
    *((name, kind) for name in ("Lion", "StableLion", "StoSignSGD", "LionMuon") for kind in ("float32", "bfloat16")),
    ("Lion", "int8"),
    ("Muon", "int8"),
    ("Lamb", "float32"),
]


def lines_of(work: Callable[[], Any]) -> int:
    """Lines of the package that run in ``work``, each turn of a loop within a line counted too."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event in ("line", "call")
        return local

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        return local(frame, event, argument) if "/ds_optim/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def grown(work: Callable[[int], Callable[[], Any]]) -> float:
    """How many times the lines of a quarter of the tensors run for all: 4 where work grows with their number."""
    few, many = work(FEW), work(MANY)
    return lines_of(many) / lines_of(few)


def stages_of_a_run(name: str, kind: str, count: int) -> dict[str, Callable[[], Any]]:
    model = nn.ParameterList([nn.Parameter(torch.randn(3, 3)) for _ in range(count)])
    for p in model.parameters():
        p.grad = torch.randn(3, 3)
    held: dict[str, Any] = {}

    def build() -> None:
        held["optimizer"] = getattr(ds_optim, name)(ds_optim.param_groups(model), momentum_dtype=kind, diagnostics=True)

    return {
        "build": build,
        "first step": lambda: held["optimizer"].step(),
        "step": lambda: held["optimizer"].step(),
        "save": lambda: held.update(state=held["optimizer"].state_dict()),
        "load": lambda: held["optimizer"].load_state_dict(held["state"]),
    }


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_run_over_many_tensors(name: str, kind: str) -> None:
    few, many = (stages_of_a_run(name, kind, count) for count in (FEW, MANY))
    for stage in few:
        assert lines_of(many[stage]) < 5 * lines_of(few[stage]), stage


def exchange(stage: int, count: int) -> Callable[[], Any]:
    specs = [ParamSpec(name=f"w{number}", shape=(3, 5)) for number in range(count)]

    def work() -> None:
        layout = build_layout([specs], stage=stage, world_size=4, sub_group_size=10**9)
        (unit,) = layout.units
        views = {number: MatrixView.from_options(spec.name, spec.shape, {}) for number, spec in enumerate(specs)}
        plan = plan_exchange(unit, views, cost=lambda m, n: 1.0, bucket_elements=10**9)
        Exchange(plan, Comm(), torch.device("cpu"))
        assert len(layout.digest() + plan.digest()) == 128
        assert len(blocks_of(unit, 1)) > count // 8

    return work


@pytest.mark.parametrize("stage", [1, 3])
def test_a_layout_and_its_exchange(stage: int) -> None:
    assert grown(lambda count: exchange(stage, count)) < 5


def scales(count: int) -> Callable[[], Any]:
    """The scales of all int8 momenta of a saved run, parameter by parameter."""
    specs = [ParamSpec(name=f"w{number}", shape=(300,)) for number in range(count)]
    layout = build_layout([specs], stage=1, world_size=2)
    blocks = [sum(n for _, n in blocks_of(layout.units[0], rank).values()) for rank in range(2)]
    shards = Shards(layout=layout, flats=[[[{"exp_avg_scale": torch.ones(n)}] for n in blocks]])
    return lambda: [shards.read_scales(spec.name, 0, 300) for spec in specs]


def test_reading_a_checkpoint() -> None:
    assert grown(scales) < 5


def test_a_loop_over_all_in_a_loop_over_all_is_seen() -> None:
    def work(count: int) -> Callable[[], Any]:
        (unit,) = build_layout([[ParamSpec(name="w", shape=(3,))] * count], stage=3, world_size=2).units
        return lambda: [list(unit.slices(0)) for _ in range(count)]

    assert grown(work) > 10
