"""Who works on which matrix: longest processing time first, then where most of it lies. And when: in bounded runs.

The bound for the makespan is max(mean load, largest job); the greedy rule stays within 4/3 of the best
and reaches a few percent as soon as there are several jobs a rank (Graham 1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def assign_owners(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Give each job to the rank that is least loaded when its turn comes, the largest jobs first.

    Args:
        costs: the cost of each job, in any unit.
        loads: what each rank has to do already (matrices that lie whole on it), in the same unit.

    Returns:
        The owner of each job. Ties go to the earlier job and the lower rank, so that every rank that
        computes this gets the same answer.
    """
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for job in _longest_first(costs):
        load, rank = heapq.heappop(heap)
        owners[job] = rank
        heapq.heappush(heap, (load + costs[job], rank))
    return owners


def nearest_owners(costs: Sequence[float], loads: Sequence[float], held: Sequence[Mapping[int, int]]) -> list[int]:
    """Owners that move fewer elements than those of :func:`assign_owners`, and make no rank busier than its busiest.

    Args:
        costs, loads: as there.
        held: for each job the elements of it that ranks hold.
    """
    greedy = assign_owners(costs, loads)
    busiest = max(_loads(greedy, costs, loads))
    owners, found = list(greedy), list(loads)
    for job in _longest_first(costs):
        near = [rank for rank in held[job] if found[rank] + costs[job] <= busiest]
        choice = sorted(near, key=lambda rank: (-held[job][rank], found[rank], rank)) or [found.index(min(found))]
        owners[job] = choice[0]
        found[choice[0]] += costs[job]
    stays = [sum(h.get(owner, 0) for h, owner in zip(held, some, strict=True)) for some in (owners, greedy)]
    return owners if max(found) <= busiest and stays[0] > stays[1] else greedy


def _longest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda j: (-costs[j], j))


def _loads(owners: Sequence[int], costs: Sequence[float], loads: Sequence[float]) -> list[float]:
    found = list(loads)
    for owner, cost in zip(owners, costs, strict=True):
        found[owner] += cost
    return found


def makespan_ratio(loads: Sequence[float], jobs: Sequence[float]) -> float:
    """The busiest rank's load over max(mean load, largest of the jobs that were dealt): 1.0 is the best there is."""
    bound = max([sum(loads) / len(loads), *jobs])
    return max(loads) / bound if bound else 1.0


def in_runs(
    ordered: Sequence[int], sizes: Mapping[int, int], kinds: Mapping[int, object], bound: int
) -> list[tuple[int, ...]]:
    """Cut a queue of jobs into runs of one kind with ``sizes`` of at most ``bound`` together, or of one job."""
    runs: list[list[int]] = []
    held = 0
    for job in ordered:
        if not runs or kinds[runs[-1][0]] != kinds[job] or held + sizes[job] > bound:
            runs.append([])
            held = 0
        runs[-1].append(job)
        held += sizes[job]
    return [tuple(run) for run in runs]
