"""How the ranks of an attempt must have ended, by the fault that ended it."""

from __future__ import annotations

from ds_optim.chaos.faults import DIFFERENCES, Fault
from ds_optim.chaos.ranks import RANKS, Attempt
from ds_optim.chaos.start import JOINED, START_POINTS
from ds_optim.job.exits import PREEMPTED, RANK_LOST, USER_ERROR


def ending_fault(attempt: Attempt, fault: Fault) -> str | None:
    """What is wrong with how the ranks ended, or None."""
    if not attempt.fired:
        return f"the fault did not fire: {last_line(attempt)}"
    if attempt.hung:
        return f"rank {attempt.hung[0]} did not end"
    expected = [_status(fault, rank) for rank in range(RANKS)]
    if attempt.statuses != expected:
        return f"the ranks ended with {attempt.statuses}, not {expected}: {last_line(attempt)}"
    for rank in range(RANKS):
        words = _words(fault, rank)
        told = [line for line in attempt.lines[rank].splitlines() if line.startswith("ds-optim: error: ")]
        if words is not None and (len(told) != 1 or not any(word in told[0] for word in words.split("|"))):
            return f"rank {rank} did not say {words!r} in one line: {told}"
    return None


def _status(fault: Fault, rank: int) -> int:
    """What a rank ends with."""
    if fault.kind == "differs":
        return USER_ERROR
    own = rank == fault.rank
    if fault.kind in ("SIGKILL", "SIGSTOP") and own:
        return -9  # a stopped one is killed here
    if fault.kind in ("SIGTERM", "SIGUSR1") and (own or not _alone(fault)):
        return PREEMPTED
    return RANK_LOST


def _words(fault: Fault, rank: int) -> str | None:
    """What a rank's one line has, each of several by ``|``; None where it says what it likes."""
    if fault.kind == "differs":
        return DIFFERENCES[fault.count][1]
    if rank == fault.rank or _status(fault, rank) != RANK_LOST:
        return None
    return (START_POINTS[fault.count].told if fault.place == "start" else "rank {rank} ").format(rank=fault.rank)


def _alone(fault: Fault) -> bool:
    """Whether the ranks are not together yet, so that a signal is one rank's own."""
    return fault.place == "start" and fault.count < JOINED


def last_line(attempt: Attempt) -> str:
    """The last thing that any rank said."""
    lines = [line.strip() for text in attempt.lines for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(no output)"
