"""A run from its rendezvous to its end: the ranks are watched, the folder is its own, and a lost rank has one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ds_optim.errors import UserError
from ds_optim.job import exits as ends
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.machine.meeting import Meeting
from ds_optim.machine.run_lock import RunLock
from ds_optim.survival.preemption import Preemption
from ds_optim.survival.watchdog import Watchdog, end_process


class Supervision:
    """What watches a run. ``done`` is the last step that this rank made, and ``begun`` says whether the folder is this
    run's, for who must note how it ended."""

    def __init__(self, settings: TrainSettings, preemption: Preemption) -> None:
        self.settings = settings
        self.preemption = preemption
        self.lock = RunLock()
        self.watchdog = Watchdog(settings.hang_timeout, self.note_lost)
        self.done = 0
        self.begun = False

    def begin(self, meeting: Meeting) -> None:
        """The ranks have met: they are watched, and asked to end together, from here on."""
        self.watchdog.start(meeting)
        self.preemption.joined(self.settings.out, first=meeting.rank == 0)

    def note_lost(self, line: str) -> None:
        """Each rank that is left notes it, for who knows which are."""
        with suppress(OSError):
            if self.begun:
                ends.note_end(self.settings.out, ends.RANK_LOST, self.done, line)
            else:
                ends.note_unbegun(self.settings.out, ends.RANK_LOST, line)
        self.lock.release()

    def stop_asked(self) -> bool:
        """Whether any rank was asked to end. Collective."""
        return ranks.sums([self.preemption.wanted()])[0] > 0


@contextmanager
def supervised(settings: TrainSettings, preemption: Preemption) -> Iterator[Supervision]:
    """The ranks joined, and watched within the block. Collective.

    Raises ``RankLost`` in place of what a rank's loss made of the block; where a rank hangs, or the ranks do not find
    each other, the process ends (``ds_optim.survival.watchdog``).
    """
    watch = Supervision(settings, preemption)
    meeting = Meeting(watch.begin)
    try:
        with _rendezvous_limit(watch, meeting):
            ranks.join(meeting)
        yield watch
        watch.watchdog.stop()
    except Exception as error:
        lost = None
        # These are raised by all ranks together.
        if not isinstance(error, (UserError, ends.RunStopped)):
            lost = watch.watchdog.explain(error) or _lost_at_start(watch, meeting, error)
        watch.watchdog.abandon()
        if lost is None:
            raise
        watch.note_lost(str(lost))
        raise lost from error
    finally:
        watch.lock.release()


def _lost_at_start(watch: Supervision, meeting: Meeting, error: BaseException) -> ends.RankLost | None:
    if watch.watchdog.watching or not ranks.is_echo(error):
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    # Before they are watched, they talk to rank 0 alone.
    who = "rank 0" if meeting.rank and watch.settings.hang_timeout else "another rank"
    return ends.RankLost(f"{who} was lost while the ranks joined ({reason})")


@contextmanager
def _rendezvous_limit(watch: Supervision, meeting: Meeting) -> Iterator[None]:
    """Within the block the ranks find each other, or the process ends: nothing else gets a thread out that waits."""
    limit_s = ranks.join_timeout()

    def late() -> None:
        line = meeting.late(limit_s)
        watch.note_lost(line)
        end_process(line)

    timer = threading.Timer(limit_s, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
