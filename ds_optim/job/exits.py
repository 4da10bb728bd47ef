"""How a run ends: the statuses that ``ds-optim train`` exits with, and the exceptions that carry them.

The numbers are those of ``sysexits.h``, where it has one, so that batch systems and scripts can tell them apart.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ds_optim.machine.files import TEXT_LIMIT, Unreadable, read_json, write_atomic

FINISHED = 0
USER_ERROR = 2
BAD_NUMBERS = 65
"""Too many steps in a row were skipped or had no finite loss: starting again alone does not help."""
RANK_LOST = 69
"""A rank died or hung: start again with ``--resume``."""
SAVE_FAILED = 74
"""The last checkpoint could not be written (a full disk): make room, then start again with ``--resume``."""
PREEMPTED = 75
"""A signal, the file ``stop`` or ``--time-limit-s``: saved, start again with ``--resume``."""

END_NAME = "end.json"
_LOG_NAME = "log.jsonl"
_CHECKPOINTS = "checkpoints/step-*/manifest.json"


class End(BaseModel):
    """How a run ended. ``again``: whether a script that starts a run again may do so at once, where its status asks
    for it."""

    model_config = ConfigDict(strict=True)

    status: int
    step: int = Field(ge=0, lt=2**53)
    line: str
    again: bool


class RunStopped(RuntimeError):
    """A run that cannot go on: one line for the user, and the ``status`` to exit with."""

    status = 1


class RankLost(RunStopped):
    """A rank died or hangs; the line names it. Other ranks' collectives cannot be trusted to end."""

    status = RANK_LOST


class Preempted(RunStopped):
    """A run that was asked to end before its first step; raised on every rank."""

    status = PREEMPTED


class BadNumbers(RunStopped):
    """A run of steps without a finite loss or gradient; raised on every rank."""

    status = BAD_NUMBERS


def note_end(out: Path | None, status: int, step: int, line: str, *, again: bool = True) -> None:
    """Leave ``OUT/end.json`` for scripts whose launcher does not pass exit statuses on (torchrun)."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        end = End(status=status, step=step, line=line, again=again)
        write_atomic(out / END_NAME, json.dumps(end.model_dump()) + "\n")


def note_unbegun(out: Path | None, status: int, line: str) -> None:
    """The same of a start that ended before the folder was its own: nothing of an earlier run is hidden.

    An end that asks for another start may be replaced, and its step is kept. One that does not stays, and so does a log
    without an end or a checkpoint, which ``--force`` alone replaces.
    """
    before = read_end(out)
    bare = out is not None and not (out / END_NAME).exists()
    if before is not None and before.status in (PREEMPTED, RANK_LOST):
        note_end(out, status, before.step, line)
    elif bare and out is not None and (not (out / _LOG_NAME).exists() or any(out.glob(_CHECKPOINTS))):
        note_end(out, status, 0, line)


def read_end(out: Path | None, since: float = 0.0) -> End | None:
    """What ``OUT/end.json`` says, if it was written after the time ``since``; None where it says nothing."""
    if out is None:
        return None
    try:
        end = read_json(out / END_NAME, End, TEXT_LIMIT)
        return end if (out / END_NAME).stat().st_mtime >= since else None
    except (OSError, Unreadable):
        return None
