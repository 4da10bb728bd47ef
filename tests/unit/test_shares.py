"""Plans in which ranks share matrices: teams that never wait for each other's turn, what is held, and where it pays."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.matrix import shared
from ds_optim.matrix.polar import PolarSpec
from ds_optim.matrix.shapes import POLAR
from ds_optim.memory.sub_groups import balance
from ds_optim.memory.tracker import TensorTracker
from ds_optim.optimizers.options import check_exchange
from ds_optim.optimizers.rules import CODES_OF_MOMENTUM
from ds_optim.optimizers.sharing import check_shared, share
from ds_optim.sharding.binding import Binding
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.held import peak_scratch
from ds_optim.sharding.layout import Layout, ParamSpec, Unit, build_layout
from ds_optim.sharding.plan import ExchangePlan
from ds_optim.sharding.shares import SharedPlan, shared_by, shared_plan
from ds_optim.sharding.teams import Team, assign_teams, sizes_of

from ..plans import views_of

SPEC = PolarSpec(dtype="bfloat16", method="auto", gram_from=1.5, strips=((4096, 2),))


def plan_of(unit: Unit, bucket_mb: float = 256, **given: Any) -> ExchangePlan:
    plain: dict[str, Any] = {"shape": POLAR, "polar": SPEC, "overlap": True, "stacked": True}
    return ExchangePlan(unit=unit, views=views_of(unit), bucket_mb=bucket_mb, **{**plain, **given})


def unit_of(shapes: list[tuple[int, int]], stage: int, ranks: int) -> Unit:
    specs = [ParamSpec(name=f"w{n}", shape=shape) for n, shape in enumerate(shapes)]
    return build_layout([specs], stage=stage, world_size=ranks).units[0]


def met_by(plan: SharedPlan, rank: int) -> list[tuple[int, int, Team]]:
    """Shared matrices as a rank comes to them: bucket, parameter, team."""
    jobs = [(number, plan.share(job)) for number, bucket in enumerate(plan.buckets) for job in bucket.owned[rank]]
    return [(number, share.param, share.team) for number, share in jobs if share is not None]


sides = st.integers(1, 60)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=12),
    st.sampled_from([1, 3]),
    st.sampled_from([2, 4, 6, 8, 16]),
    st.sampled_from([1e-3, 1e-2, 256]),
)
def test_all_of_a_team_meet_at_its_matrices_in_one_order(
    shapes: list[tuple[int, int]], stage: int, ranks: int, bucket_mb: float
) -> None:
    """In the same bucket, what larger teams share before what smaller ones do: so no ranks wait in a circle. Shares are
    all of a matrix; what one rank sends another expects; no rank holds more than the bound."""
    plan = plan_of(unit_of(shapes, stage, ranks), bucket_mb)
    with pytest.MonkeyPatch.context() as patch:  # as if messages were free: several sizes of teams in one plan
        patch.setattr(shared, "_BYTE", 0.0)
        patch.setattr(shared, "_MESSAGE", 0.0)
        found = shared_plan(plan, sizes_of(ranks, 8))
        if not isinstance(found, SharedPlan):
            return
        assert max(found.loads) < max(plan.loads)
    for rank in range(ranks):
        own = met_by(found, rank)
        teams = [team for _, _, team in own]
        assert teams == sorted(teams, key=lambda team: -team.size)
        for team in set(teams):
            assert rank in team.ranks
            assert len({tuple(met for met in met_by(found, peer) if met[2] == team) for peer in team.ranks}) == 1
    jobs = [job for bucket in found.buckets for params in bucket.owned for job in params]
    assert sorted(jobs) == sorted(found.cut)
    for param in plan.cut:
        covered = [s.numel for s in found.shares if s.param == param]
        assert sum(covered) == plan.unit.params[param].numel if covered else param in jobs
    for bucket in found.buckets:
        counts = [(found.sent_counts(bucket, r), found.received_counts(bucket, r)) for r in range(ranks)]
        assert all(counts[a][0][b] == counts[b][1][a] for a in range(ranks) for b in range(ranks))
    c = found.held_per_element
    rows = max(max(-(-m // 2) * n for _, m, n in view.matrices()) for view in plan.views.values())
    largest = max([rows, *(plan.unit.params[p].numel for p in plan.views if p not in {s.param for s in found.shares})])
    bound = max(bucket_mb * 2**20, c * largest) + c * (len(found.views) if stage == 3 else 0)
    assert max(peak_scratch(found, rank) for rank in range(ranks)) <= bound


@dataclass
class Alone:
    """One rank of a team that is not there: nobody's parts come, in as much memory."""

    rank: int
    world_size: int

    def all_to_all(self, out: Tensor, out_counts: list[int], message: Tensor, counts: list[int]) -> Alone:
        assert (out.numel(), message.numel()) == (sum(out_counts), sum(counts))
        return self

    def wait(self) -> None: ...

    def all_gather(self, out: Tensor, values: Tensor) -> None:
        out.view(self.world_size, -1).copy_(values)


@pytest.mark.parametrize(("m", "n", "dtype"), [(48, 200, "float16"), (201, 47, "float32")])
def test_what_a_team_holds_is_counted(m: int, n: int, dtype: str) -> None:
    spec = PolarSpec(dtype=dtype, method="standard", normalize="schatten4", gram_from=2.0, strips=())
    rows = torch.randn(-(-m // 4), n).to(spec.message_dtype)
    with TensorTracker() as tracker:
        shared.polar_of_rows(rows, m, spec, Alone(3, 4))
    held, said = tracker.peak_bytes - tracker.base_bytes, shared.scratch_bytes(m, n, spec, 4)
    assert 0.8 * said <= held <= said + 64


@pytest.mark.parametrize(
    ("ranks", "stage", "without", "within"),
    [(16, 3, 1.19, 1.10), (64, 1, 1.0, 0.70)],
)
def test_it_brings_a_large_models_ranks_what_whole_matrices_cannot(
    ranks: int, stage: int, without: float, within: float
) -> None:
    """A Llama 70B's matrices on a sixteenth of 256 and of 1,024 ranks."""
    shapes = ([(28672, 8192)] * 2 + [(8192, 28672)] + [(8192, 8192)] * 2 + [(1024, 8192)] * 2) * 5
    plan = plan_of(unit_of(shapes, stage, ranks))
    found = shared_by(plan, "auto", 8)
    assert balance([plan], ranks)[0] == pytest.approx(without, abs=0.01)
    assert balance([found], ranks)[0] < within
    assert isinstance(found, SharedPlan)
    assert found.makespan == pytest.approx(balance([found], ranks)[0])
    assert max(peak_scratch(found, rank) for rank in range(ranks)) < max(
        peak_scratch(plan, rank) for rank in range(ranks)
    )


def test_nothing_is_shared_where_it_does_not_pay() -> None:
    """Matrices of a small model, a CPU's messages, a rule that wants whole matrices, one rank a node."""
    small, large = (unit_of([side] * 4, 3, 16) for side in ((768, 2304), (8192, 8192)))
    assert shared_by(plan_of(small), "auto", 8).shared == 0
    assert shared_by(plan_of(large), "auto", 8).shared == 4
    assert shared_by(plan_of(large, stacked=False), "auto", 8).shared == 0
    assert shared_by(plan_of(large), "auto", 1).shared == 0
    assert shared_by(plan_of(large, polar=PolarSpec(method="svd", dtype="bfloat16")), 2, 8).shared == 0
    assert sizes_of(48, 8) == (1, 2, 4, 8)
    assert sizes_of(12, 6) == (1, 2)
    assert assign_teams([{1: 4.0}], [0.0, 0.0], [()], 4.0) is None


@pytest.mark.parametrize(
    ("state", "whole", "told"),
    [({}, True, "this rule wants whole matrices"), ({CODES_OF_MOMENTUM: 0}, False, 'take momentum_dtype "bfloat16"')],
)
def test_rules_and_momentum_that_cannot_go_in_parts_are_refused(state: Any, whole: bool, told: str) -> None:
    local: Any = SimpleNamespace(states=[state])
    exchanges: list[Any] = [SimpleNamespace(plan=SimpleNamespace(shared=count)) for count in (0, 1)]
    check_shared(local, exchanges[0], whole=whole)
    with pytest.raises(UserError, match=told):
        check_shared(local, exchanges[1], whole=whole)


def test_mistakes_are_one_line() -> None:
    for value in (True, 1, 0, 2.0, "node"):
        with pytest.raises(UserError, match=r'exchange.share is .*: write false, "auto", or a whole number of ranks'):
            check_exchange({"share": value})
    with pytest.raises(UserError, match=r"exchange.share is 3, and 16 ranks are no multiple of it: write a divisor"):
        shared_by(plan_of(unit_of([(8, 8)], 3, 16)), 3, 8)
    layout = Layout(stage=3, world_size=1, units=())
    for wrong, told in (
        ({"tensor": Comm()}, "take it out beside tensor or pipeline parallelism"),
        ({"tensors": [[torch.empty(1)]], "device": torch.device("meta")}, "take it or offload_optimizer out"),
    ):
        parts = {"device": torch.device("cpu"), "tensors": [], **wrong}
        with pytest.raises(UserError, match=told):
            share(Binding(layout=layout, comm=Comm(), members=[], **parts), {}, 2)  # type: ignore[arg-type]
