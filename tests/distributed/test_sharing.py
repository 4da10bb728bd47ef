"""Matrices that ranks share: the factors of whole ones, the bytes of the formula, and training that goes on alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.matrix.polar import PolarSpec, polar
from ds_optim.matrix.shapes import POLAR, SIGN_POLAR
from ds_optim.optimizers.matrices import shaped
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.exchange import Values
from ds_optim.sharding.layout import ParamSpec, Slice, build_layout
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shares import SharedPlan, shared_by
from ds_optim.sharding.sharing import SharedExchange, teams_of

from ..plans import views_of
from .harness import device, run_ranks
from .models import batch, share
from .small_runs import BATCH, Cell, Weights, differences, equal, full_weights, own_optimizer, snapshot, start

CASES = 8
SPECS = (
    PolarSpec(dtype="bfloat16", method="standard"),
    PolarSpec(dtype="float32", method="standard", schedule="you", normalize="schatten4"),
)


@dataclass
class Seen:
    """What a rank saw of one exchange: its slices of the results, and bytes counted and planned."""

    slices: list[tuple[Slice, Tensor]]
    sent: int
    planned: int
    shared: int
    again: bool


def plan_of(number: int, ranks: int) -> ExchangePlan:
    """Matrices of a few random shapes, tall, wide, and too thin for a team."""
    random = Random(number)
    sides = [random.randint(5, 40) for _ in range(3)] + [1]
    shapes = [(random.choice(sides), random.choice(sides)) for _ in range(random.randint(2, 9))]
    specs = [ParamSpec(name=f"w{n}", shape=shape) for n, shape in enumerate(shapes)]
    (unit,) = build_layout([specs], stage=(1, 3)[number % 2], world_size=ranks).units
    return ExchangePlan(
        unit=unit,
        views=views_of(unit, transpose=number % 4 == 3),
        shape=(POLAR, SIGN_POLAR)[number % 3 == 2],
        polar=SPECS[number // 2 % 2].resolve(torch.device("cpu")),
        bucket_mb=random.choice([1e-4, 1e-2, 1.0]),
        overlap=bool(number // 4 % 2),
        stacked=False,
    )


def direction(plan: ExchangePlan, param: int) -> Tensor:
    shape = plan.unit.params[param].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(param)).mul_(10.0 ** (param - 4))


def exchange_all(rank: int, world_size: int) -> list[Seen]:
    found = []
    for number in range(CASES):
        plan = shared_by(plan_of(number, world_size), 2 + 2 * (number % 2), world_size)
        found.append(_exchange(plan, Comm.of_group(dist.group.WORLD)))
    return found


def keeping(slices: list[tuple[Slice, Tensor]]) -> Values:
    return lambda held, results: slices.append((held, results[0].clone().cpu()))


def _exchange(plan: ExchangePlan, comm: Comm) -> Seen:
    assert isinstance(plan, SharedPlan)
    teams = teams_of(comm, [plan])
    exchange = SharedExchange(plan, comm, device(), device(), teams)
    runs: list[list[tuple[Slice, Tensor]]] = []

    def fill(held: Slice, messages: Sequence[Tensor]) -> None:
        messages[0].copy_(direction(plan, held.param).view(-1)[held.start : held.start + held.numel])

    for _ in range(2):
        slices: list[tuple[Slice, Tensor]] = []
        exchange.run(fill, shaped(plan, None), keeping(slices))
        runs.append(slices)
    sent = comm.sent_bytes + sum(team.sent_bytes for team in teams.values())
    shared = len({share.param for share in plan.shares})
    again = all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(*runs, strict=True))
    return Seen(runs[0], sent, 2 * plan.sent_bytes(comm.rank), shared, again)


@pytest.mark.full
def test_shared_matrices_have_the_factors_of_whole_ones_and_the_bytes_of_the_plan() -> None:
    """Of each slice as it lies, whatever cut it: as near to the exact factor as whole matrices in the same dtype."""
    every = run_ranks(4, exchange_all)
    for number in range(CASES):
        plan, ranks = plan_of(number, 4), [of_rank[number] for of_rank in every]
        assert sum(one.shared for one in ranks) > 0
        assert all(one.again for one in ranks), "the same bits at every step"
        assert [one.sent for one in ranks] == [one.planned for one in ranks]
        apart: tuple[list[float], list[float]] = [], []
        for param, view in plan.views.items():
            got = torch.zeros(plan.unit.params[param].numel)
            covered = torch.zeros(plan.unit.params[param].numel)
            for held, values in (pair for one in ranks for pair in one.slices if pair[0].param == param):
                got[held.start : held.start + held.numel] = values.float()
                covered[held.start : held.start + held.numel] += 1
            assert (covered == 1).all()
            wide = direction(plan, param).view(-1)
            (matrix,) = view.unpack(wide.to(plan.polar.message_dtype))
            (result,) = view.unpack(got)
            whole, exact = (
                polar(matrix, plan.polar).float(),
                polar(matrix.float(), replace(plan.polar, dtype="float32")),
            )
            if plan.shape is SIGN_POLAR:
                whole, exact = whole.sign(), exact.sign()
            for errors, factor in zip(apart, (result, whole), strict=True):
                errors.append(float((factor - exact).norm() / exact.norm()))
        assert math.hypot(*apart[0]) < 1.2 * math.hypot(*apart[1]) + 1e-4, (number, apart)


STEPS = 4
WHOLE: dict[str, Any] = {"polar": {"dtype": "bfloat16", "method": "standard"}, "exchange": {"costs": "modelled"}}
SHARED = {1: 2, 2: 4, 3: 4}
"""By stage, how many ranks share each matrix."""
EXACT = {**WHOLE, "polar": {"dtype": "float32", "method": "standard"}}


@dataclass
class Run:
    """What a rank saw of one training: losses here, the model's weights, bytes of state and of messages."""

    losses: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    state: int = 0
    sent: int = 0
    planned: int = 0
    shared: int = 0


def steps(engine: Any, numbers: Sequence[int], rank: int, world_size: int, run: Run) -> Run:
    for step in numbers:
        tokens, targets = share(*batch(step, BATCH), rank, world_size)
        loss = engine(tokens.to(device()), targets.to(device()))
        engine.backward(loss)
        engine.step()
        run.losses.append(loss.item())
    run.weights = full_weights(engine)
    return run


def sharing(share: int) -> dict[str, Any]:
    return {**WHOLE, "exchange": {"costs": "modelled", "share": share}}


def train_all(rank: int, world_size: int, folder: Path) -> tuple[dict[str, Run], list[str]]:
    """By kind of run and stage; and what was not as before in what went on from the shared ones' checkpoints."""

    def engine_of(stage: int, params: dict[str, Any]) -> Any:
        return start(Cell(stage=stage), world_size, {"type": "Muon", "params": params})

    def run(name: str, stage: int, params: dict[str, Any]) -> Run:
        engine, run = engine_of(stage, params), Run()
        steps(engine, range(2), rank, world_size, run)
        if name == "shared":
            engine.save_checkpoint(str(folder / str(stage)))
            saved[stage] = snapshot(engine)
        steps(engine, range(2, STEPS), rank, world_size, run)
        optimizer = own_optimizer(engine)
        run.state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        for exchange in optimizer.exchanges.values():
            run.planned += STEPS * exchange.plan.sent_bytes(rank)
            run.sent += exchange.comm.sent_bytes
            run.shared += exchange.plan.shared
            if isinstance(exchange, SharedExchange):
                run.sent += sum(team.sent_bytes for team in exchange.teams.values())
        engine.destroy()
        return run

    saved: dict[int, dict[str, Any]] = {}
    runs = {"exact": run("exact", 3, EXACT), "whole": run("whole", 3, WHOLE)}
    runs |= {f"shared, {stage}": run("shared", stage, sharing(ranks)) for stage, ranks in SHARED.items()}
    wrong = []
    for stage, params in ((1, WHOLE), (3, sharing(SHARED[3]))):
        engine = engine_of(stage, params)
        engine.load_checkpoint(str(folder / str(stage)))
        wrong += differences(saved[stage], snapshot(engine))
    there = steps(engine, range(2, STEPS), rank, world_size, Run())
    return runs, wrong + equal(there.weights, runs["shared, 3"].weights)


@pytest.mark.full
def test_training_is_that_of_whole_matrices_and_its_checkpoints_are_theirs(tmp_path: Path) -> None:
    """Weights and losses as near to those of exact products as bfloat16 is anyway, the same on all ranks."""
    every = run_ranks(4, train_all, tmp_path)
    for runs, wrong in every:
        assert not wrong
        exact, whole = runs["exact"], runs["whole"]
        for name in (f"shared, {stage}" for stage in SHARED):
            shared = runs[name]
            assert shared.shared > 0
            assert not equal(shared.weights, every[0][0][name].weights)
            apart = [
                math.sqrt(sum(float((run.weights[name] - w).square().sum()) for name, w in exact.weights.items()))
                for run in (shared, whole)
            ]
            assert 0 < apart[0] < 1.3 * apart[1]
            assert shared.losses == pytest.approx(whole.losses, rel=1e-4)
            assert shared.sent == shared.planned > whole.sent == whole.planned
        assert runs["shared, 3"].state == whole.state
