"""Two runs in one folder, and ranks that come apart in mid-run: each a story of its own for ``ds-optim chaos``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_optim.chaos.endings import last_line
from ds_optim.chaos.faults import GO, Fault
from ds_optim.chaos.killed_run import KILL_BOUND_S, SAVE_EVERY, Attempts, Outcome
from ds_optim.chaos.ranks import RANKS, Attempt, ForkServer, Running
from ds_optim.job.exits import USER_ERROR

_STEPS = 6
_HELD_AT = 3


class _Fired:
    """An attempt that goes on once its fault fired."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def poll(self) -> Attempt | None:
        return self._running.poll() or (Attempt() if self._running.has_fired() else None)

    def end(self) -> None:
        self._running.end()


def two_runs(server: ForkServer, folder: Path, settings: dict[str, Any], tell: Callable[[Outcome], None]) -> Attempts:
    """Runs in the folder of one that runs, a new one and one to resume it: refused, and the first goes on."""
    plan = {**settings, "steps": _STEPS, "save_every": SAVE_EVERY}
    reference = yield server.start(folder / "uninterrupted", {**plan, "save_every": 0}, None)
    held = {**plan, "out": folder / "out"}
    fault = Fault(kind="waits", place="forward", rank=0, step=_HELD_AT)
    first = server.start(folder / "first", held, fault, KILL_BOUND_S)
    others: dict[str, Attempt] = {}
    try:
        yield _Fired(first)
        for name, resume in (("new", False), ("--resume", True)):
            others[name] = yield server.start(folder / name, {**held, "resume": resume}, None)
        (folder / "first" / GO).touch()
        attempt = yield first
    finally:
        first.end()
    for name, second in others.items():
        wrong = None
        told = [line for line in second.lines[0].splitlines() if line.startswith("ds-optim: error: ")]
        if second.statuses != [USER_ERROR] * RANKS or len(told) != 1 or "is written to by process" not in told[0]:
            wrong = f"it ended with {second.statuses}: {last_line(second)}"
        elif attempt.statuses != [0] * RANKS or attempt.losses != reference.losses:
            wrong = f"the first one ended with {attempt.statuses}, or with other losses: {last_line(attempt)}"
        tell(Outcome(fault="a second run", where=f"the folder of one that runs, {name}", wrong=wrong))


def come_apart(
    server: ForkServer, folder: Path, settings: dict[str, Any], every: int, tell: Callable[[Outcome], None]
) -> Attempts:
    """A number of one rank's optimizer changes in mid-run: all are told within ``every`` steps."""
    fault = Fault(kind="differs", place="forward", rank=1, step=_HELD_AT, count=1)
    plan = {**settings, "steps": 2 * every + _HELD_AT, "save_every": 0, "out": folder / "out"}
    attempt = yield server.start(folder / "apart", plan, fault, KILL_BOUND_S)
    wrong = None
    told = [[line for line in text.splitlines() if line.startswith("ds-optim: error: ")] for text in attempt.lines]
    if attempt.statuses != [USER_ERROR] * RANKS:
        wrong = f"the ranks ended with {attempt.statuses}: {last_line(attempt)}"
    elif any(len(lines) != 1 or "the ranks disagree on the weight_decay" not in lines[0] for lines in told):
        wrong = f"they did not say what differs: {told}"
    elif attempt.reached >= _HELD_AT + every:
        wrong = f"they were told after step {attempt.reached}, not within {every} steps of step {_HELD_AT}"
    tell(
        Outcome(
            fault="differs",
            where=f"{fault.where}, in mid-run",
            wrong=wrong,
            lost=attempt.reached,
            allowed=_HELD_AT + every,
            end_s=attempt.end_s,
            bound_s=KILL_BOUND_S,
        )
    )
