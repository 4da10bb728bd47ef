"""``ds-optim simulate``: the plan of an exchange without weights, against the formula and what real steps sent."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from ds_optim.bench import engines
from ds_optim.bench.engines import qwen3
from ds_optim.cli.simulate import simulate as command
from ds_optim.errors import UserError
from ds_optim.memory.estimate import layout_of
from ds_optim.memory.estimate_exchange import exchange_plans
from ds_optim.memory.estimate_model import ModelShape, shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import ZeroSettings
from ds_optim.memory.simulate import Simulated, simulate
from ds_optim.sharding.owners import assign_owners

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@cache
def model() -> ModelShape:
    """The model of ``ds-optim bench wire --width 128 --layers 4 --vocabulary 512``."""
    with torch.device("meta"):
        return shape_of_module("bench", qwen3(engines.ModelShape(width=128, layers=4, vocabulary=512)))


def run(stage: int, ranks: int, *, ranks_per_node: int = 8, optimizer: str = "muon") -> Simulated:
    shape = model()
    plan = plan_optimizer(shape, optimizer, {"polar": {"dtype": "bfloat16"}}, device="cpu")
    return simulate(shape, plan, ZeroSettings(stage=stage, ranks=ranks, device="cpu"), ranks_per_node)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_stage_3_sends_what_the_formula_says(ranks: int) -> None:
    found = run(3, ranks)
    assert found.mean_bytes == pytest.approx(found.formula, rel=0.02), "but for the last slices, which are shorter"
    assert found.bytes_an_element == 4, "two there and two back"


def test_one_rank_sends_nothing() -> None:
    assert run(3, 1).mean_bytes == 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_send_at_most_a_matrix_a_border(stage: int, ranks: int) -> None:
    largest = max(p.numel for p in model().parameters if p.role == "matrix")
    assert ranks * run(stage, ranks).mean_bytes <= (ranks - 1) * largest * 4


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_is_what_real_runs_were_counted_to_send(stage: int, ranks: int) -> None:
    """Bytes beyond AdamW's that Muon's steps handed to collectives, as ``benchmarks/results`` keeps them."""
    (path,) = RESULTS.glob(f"wire_bytes-{ranks}ranks-cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counted = next(r["extra"]["handed_over_adamw"] for r in rows if (r["optimizer"], r["stage"]) == ("Muon", stage))
    assert run(stage, ranks).mean_bytes == pytest.approx(counted, rel=0.05, abs=64)


def test_bytes_between_nodes_are_all_but_those_to_neighbours() -> None:
    alone, pairs, together = (run(3, 4, ranks_per_node=n) for n in (1, 2, 4))
    assert alone.inside == together.between == 0
    assert pairs.inside + pairs.between == pairs.mean_bytes == alone.mean_bytes
    assert pairs.between == pytest.approx(2 / 3 * pairs.mean_bytes, rel=0.1), "two of three peers are elsewhere"


def test_owners_are_balanced_where_there_are_many_matrices() -> None:
    found = run(3, 3)
    assert found.jobs == pytest.approx(28 / 3)
    assert found.makespan <= 1.05
    assert 0 <= found.idle < 0.1


@pytest.mark.parametrize(("ranks", "size"), [(2, 70_000), (4, 70_000), (4, 100_000), (8, 30_000)])
def test_sub_groups_follow_each_other(ranks: int, size: int) -> None:
    """Each lasts as long as its busiest rank; a size that is named balances better, as simulated with it."""
    shape, plan = model(), plan_optimizer(model(), "muon", {"polar": {"dtype": "bfloat16"}}, device="cpu")
    zero = ZeroSettings(stage=3, ranks=ranks, device="cpu", sub_group_size=size)
    loads = [one.loads for one in exchange_plans(layout_of(plan, zero).units, plan, zero)]
    found = simulate(shape, plan, zero)
    assert len(loads) > 1
    assert found.idle == pytest.approx(1 - sum(map(sum, loads)) / (ranks * sum(map(max, loads))))
    assert found.makespan >= run(3, ranks).makespan - 1e-9, "one exchange of all is never worse"
    if found.better_size is not None:
        assert found.better_size <= size
        there = simulate(shape, plan, replace(zero, sub_group_size=found.better_size))
        assert there.makespan == found.better_makespan < found.makespan - 0.01


def test_a_last_sub_group_of_a_few_matrices_is_evened_out() -> None:
    """As a 70B model on 64 ranks has one: all but some matrices first, which keep a few ranks busy then."""
    shape, plan = model(), plan_optimizer(model(), "muon", {"polar": {"dtype": "bfloat16"}}, device="cpu")
    most = sum(p.numel for p in shape.parameters if p.role == "matrix") // 4 * 9 // 10
    found = simulate(shape, plan, ZeroSettings(stage=3, ranks=4, device="cpu", sub_group_size=most))
    assert found.better_size is not None
    assert found.better_makespan is not None
    assert found.better_makespan < 1.05 < 1.15 < found.makespan


@pytest.mark.parametrize(
    ("ranks", "large", "small"), [(8, 28, 20), (16, 56, 38), (32, 112, 76), (64, 15, 10), (64, 30, 20)]
)
def test_no_owners_are_better_for_a_transformers_matrices(ranks: int, large: int, small: int) -> None:
    """A Llama 70B's two costs, 1 and 0.469, in the numbers of its sub-groups: where the busiest rank is above the
    bound, whole matrices allow no less."""
    jobs = [1000] * large + [469] * small
    loads = [0] * ranks
    for job, owner in zip(jobs, assign_owners(jobs, [0] * ranks), strict=True):
        loads[owner] += job
    assert fits(max(loads), ranks, large, small)
    assert not fits(max(loads) - 1, ranks, large, small)


def fits(most: int, ranks: int, large: int, small: int) -> bool:
    """Whether some assignment keeps every rank within ``most``: by how many small ones go in beside k large ones."""
    beside = [(most - 1000 * k) // 469 for k in range(most // 1000 + 1)]
    held = [0, *[-1] * large]  # the most small ones with so many large ones dealt
    for _ in range(ranks):
        held = [
            max((held[n - k] + beside[k] for k in range(min(n + 1, len(beside))) if held[n - k] >= 0), default=-1)
            for n in range(large + 1)
        ]
    return held[large] >= small


def test_more_ranks_than_matrices_wait_for_the_largest() -> None:
    found = run(3, 64)
    assert found.makespan == pytest.approx(1.0)
    assert found.idle > 0.5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"optimizer": "lion"}, "no matrices travel for lion: name one that works on whole ones"),
        ({"ranks": "0"}, "--ranks: '0' is no whole number from 1"),
        ({"ranks_per_node": 0}, "--ranks-per-node is 0"),
    ],
)
def test_mistakes_are_one_line(given: dict[str, object], told: str) -> None:
    flags: dict[str, object] = {"model": "qwen3-tiny", "optimizer": "muon", "stages": "3", "ranks": "2"}
    flags |= {"ranks_per_node": 8, "optimizer_params": None, "dtype": "bf16", "as_json": False}
    with pytest.raises(UserError, match=told):
        command(**{**flags, **given})  # type: ignore[arg-type]
