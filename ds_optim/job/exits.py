"""How a run ends: the statuses that ``ds-optim train`` exits with, and the exceptions that carry them.

The numbers are those of ``sysexits.h``, where it has one, so that batch systems and scripts can tell them apart.
"""

from __future__ import annotations

import json
from pathlib import Path

from ds_optim.machine.files import write_atomic

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
    """Leave ``OUT/end.json`` for scripts whose launcher does not pass exit statuses on (torchrun).

    ``again``: whether a script that starts a run again may do so at once, where its status asks for it.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {"status": status, "step": step, "line": line, "again": again}
        write_atomic(out / END_NAME, json.dumps(record) + "\n")
