"""Who works on which matrix, agreed on by all ranks before the first step.

"auto" asks the hardware and costs are by the clock, so that ranks would choose differently: rank 0 chooses for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_optim.matrix.polar import PolarSpec
from ds_optim.optimizers.alike import check_alike
from ds_optim.optimizers.costs import Costs, costs_of, measured
from ds_optim.optimizers.matrices import MatrixWorker, views_of
from ds_optim.optimizers.matrix_work import MatrixWork
from ds_optim.optimizers.rules import RULES
from ds_optim.sharding.binding import Binding


def plan_workers(
    binding: Binding, rules: Sequence[str], polar: PolarSpec, exchange: Mapping[str, Any], saved: Costs | None
) -> tuple[dict[int, MatrixWorker], Costs | None]:
    """A worker for each unit whose rule may ask for matrices, and the costs that owners were chosen by.

    Args:
        rules: of the units, in their order.
        saved: the costs of a checkpoint. None of them is measured anew, so that its plan is made again.

    Raises:
        RuntimeError: rank 0 could not plan; on every rank.
        UserError: plans differ all the same; on every rank.
    """
    works = _works(binding, rules, polar, exchange)
    choice = _guarded(binding, works, exchange["costs"] == "measured", saved) if binding.peers.rank == 0 else None
    choice = binding.peers.gather_objects(choice)[0]
    if isinstance(choice, str):
        raise RuntimeError(f"rank 0 could not plan the exchange of matrices: {choice}")
    workers = {}
    for number, work in works.items():
        work = replace(work, polar=choice.polars[number], costs=choice.costs[number])
        unit, members = binding.layout.units[number], binding.members[number]
        workers[number] = MatrixWorker(unit, members, binding.comm, work=work, device=binding.device)
    plans = repr([(number, worker.digest()) for number, worker in sorted(workers.items())])
    digest = hashlib.sha256(plans.encode()).hexdigest()[:12]
    check_alike(binding.peers.gather_objects({"plan of the exchange of matrices": digest}))
    return workers, choice.table


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What rank 0 chose: by unit, how to orthogonalize and what its matrices cost; and all costs, to be saved."""

    polars: dict[int, PolarSpec]
    costs: dict[int, dict[tuple[int, int], float] | None]
    table: Costs | None


def _guarded(binding: Binding, works: Mapping[int, MatrixWork], timed: bool, saved: Costs | None) -> _Choice | str:
    """The choice, or why there is none: the other ranks wait for an answer."""
    try:
        return _chosen(binding, works, timed, saved)
    except Exception as problem:
        return f"{type(problem).__name__}: {' '.join(str(problem).split())}"


def _chosen(binding: Binding, works: Mapping[int, MatrixWork], timed: bool, saved: Costs | None) -> _Choice:
    works = {number: _resolved(work, binding, number) for number, work in works.items()}
    table = _costs(binding, works, saved) if timed else None
    costs: dict[int, dict[tuple[int, int], float] | None] = dict.fromkeys(works)
    if table is not None:
        for number, work in works.items():
            costs[number] = costs_of(work, binding.device, table, _matrices(binding, number))
    return _Choice(polars={number: work.polar for number, work in works.items()}, costs=costs, table=table)


def _works(
    binding: Binding, rules: Sequence[str], polar: PolarSpec, exchange: Mapping[str, Any]
) -> dict[int, MatrixWork]:
    works = {}
    for number, rule in enumerate(rules):
        shape = RULES[rule].shape
        if shape is not None:
            works[number] = MatrixWork(
                shape=shape,
                polar=polar,
                bucket_mb=exchange["bucket_mb"],
                overlap=exchange["overlap"],
                stacked=binding.device.type != "cpu",
            )
    return works


def _resolved(work: MatrixWork, binding: Binding, number: int) -> MatrixWork:
    weights = binding.members[number][0].parameter.dtype
    return replace(work, polar=work.polar.resolve(binding.device, weights))


def _costs(binding: Binding, works: Mapping[int, MatrixWork], saved: Costs | None) -> Costs | None:
    """What the owners of cut matrices are chosen by; None where no matrix is cut."""
    units = binding.layout.units
    cut = {
        number: work
        for number, work in works.items()
        if any(len(units[number].holders(param)) > 1 for param in range(len(units[number].params)))
    }
    if not cut:
        return None
    return measured([(work, _matrices(binding, number)) for number, work in cut.items()], binding.device, saved)


def _matrices(binding: Binding, number: int) -> frozenset[tuple[int, int]]:
    """The shapes of a unit's matrices."""
    views = set(views_of(binding.members[number]).values())
    return frozenset((m, n) for view in views for _, m, n in view.matrices())
