"""Teams: ranks that share matrices. Which matrices are shared by how many, so that the busiest rank is done sooner.

Teams of one size are neighbours, ranks k g to k g + g - 1, and those of a smaller size lie within them. So if every
rank works on what the largest teams share first, then on what the next smaller ones do, and at last on its own, the
ranks of a team come to each matrix together: nobody waits within a team, and a rank's time is the sum of its work.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_HALVINGS = 12
#: A plan with teams is taken where its busiest rank is done in so much less than the busiest of whole matrices.
_WORTH = 0.03


@dataclass(frozen=True, order=True)
class Team:
    """The ``size`` ranks from ``first`` on."""

    size: int
    first: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)


Job = Mapping[int, float]
"""What a matrix costs each rank of a team, by the team's size: of the sizes that may share it, 1 for a whole one."""


def sizes_of(world_size: int, ranks_per_node: int) -> tuple[int, ...]:
    """Sizes of teams that leave no rank out and cross no node: 1 and powers of two."""
    sizes = [1]
    while ranks_per_node % (2 * sizes[-1]) == world_size % (2 * sizes[-1]) == 0:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def assign_teams(
    jobs: Sequence[Job], loads: Sequence[float], near: Sequence[Sequence[int]], busiest: float
) -> list[Team] | None:
    """Teams with which the busiest rank does clearly less than ``busiest``; None where there are none.

    The least bound is looked for by halving. Under a bound each job, the dearest first, goes to the smallest team that
    it fits into, which wastes the least: a near one, or the least busy of that size (a dual approximation, Hochbaum
    and Shmoys 1987, for jobs that may take several ranks).

    Args:
        loads: what each rank has to do already.
        near: for each job the ranks to which it should go where it can, the best first.
        busiest: what whole matrices reach.
    """
    sizes = tuple(sorted({size for job in jobs for size in job}))
    if sizes in ((), (1,)):
        return None
    low, high = max(loads), busiest * (1 - _WORTH)
    best = None
    for _ in range(_HALVINGS):
        bound = high if best is None else (low + high) / 2
        found = _within(bound, jobs, loads, near, sizes)
        if found is not None:
            best, high = found, bound
        elif best is None:
            return None
        else:
            low = bound
    return best


def deal_teams(jobs: Sequence[Job], loads: Sequence[float]) -> list[Team]:
    """A team of its smallest size for each job: the least busy."""
    sizes = sorted({size for job in jobs for size in job})
    found = _within(math.inf, jobs, loads, [()] * len(jobs), sizes)
    assert found is not None, "without a bound each fits"
    return found


def _within(
    bound: float, jobs: Sequence[Job], loads: Sequence[float], near: Sequence[Sequence[int]], sizes: Sequence[int]
) -> list[Team] | None:
    busy = _Busy(loads, sizes)
    found: dict[int, Team] = {}
    for number in sorted(range(len(jobs)), key=lambda n: (-max(jobs[n].values()), n)):
        for size, cost in sorted(jobs[number].items()):
            team = busy.fitting(size, bound - cost, near[number])
            if team is not None:
                busy.add(team, cost)
                found[number] = team
                break
        else:
            return None
    return [found[number] for number in range(len(jobs))]


class _Busy:
    """What the busiest rank of each team of each size has to do, and the least busy team."""

    def __init__(self, loads: Sequence[float], sizes: Sequence[int]) -> None:
        self._of_rank = list(loads)
        self._most = {size: [max(loads[k : k + size]) for k in range(0, len(loads), size)] for size in sizes}
        self._queues = {size: [(load, k) for k, load in enumerate(of_size)] for size, of_size in self._most.items()}
        for queue in self._queues.values():
            heapq.heapify(queue)

    def fitting(self, size: int, most: float, near: Sequence[int]) -> Team | None:
        """A team that has no more to do than ``most``."""
        loads, queue = self._most[size], self._queues[size]
        for rank in near:
            if loads[rank // size] <= most:
                return Team(size, rank // size * size)
        while loads[queue[0][1]] != queue[0][0]:  # has got more to do since
            heapq.heappop(queue)
        return Team(size, queue[0][1] * size) if queue[0][0] <= most else None

    def add(self, team: Team, cost: float) -> None:
        for rank in team.ranks:
            self._of_rank[rank] += cost
        for size, loads in self._most.items():
            for k in range(team.first // size, -(-(team.first + team.size) // size)):
                loads[k] = max(self._of_rank[k * size : (k + 1) * size])
                heapq.heappush(self._queues[size], (loads[k], k))
