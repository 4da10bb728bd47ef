"""One run that is killed again and again, and what must be true after each of its attempts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ds_optim.chaos.damage import Damage, all_damages, contents, do_damage
from ds_optim.chaos.endings import ending_fault, last_line
from ds_optim.chaos.faults import DIFFERENCES, SAVE_POINTS, Fault, Kind, Place
from ds_optim.chaos.ranks import RANKS, Attempt, Awaited, ForkServer, Running
from ds_optim.chaos.start import JOINED, START_POINTS
from ds_optim.job.run_log import LOG_NAME
from ds_optim.survival import manifest
from ds_optim.survival.resume import FOLDER

SAVE_EVERY = 2
KEEP = 3
LEAD = 7
"""Steps before the first fault: a run without three checkpoints has nothing to lose."""
REACH = 5
"""A fault comes at most so many steps after an attempt began."""
HANG_S = 6.0
KILL_BOUND_S = 30.0
HANG_BOUND_S = HANG_S + 30.0
AT_START = 0.2
"""Of the faults, how many come before the first step of an attempt."""
JOIN_S = 10.0
"""How long ranks wait for one that does not join, where one is lost before."""

#: Yields an attempt that was started, and is sent it back when it ended.
Attempts = Generator[Awaited, Any, None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One fault, and what it cost: ``lost`` steps of at most ``allowed``; ``wrong`` says what was not as promised."""

    fault: str
    where: str
    wrong: str | None
    lost: int = 0
    allowed: int = 0
    end_s: float = 0.0
    bound_s: float = 0.0


class KilledRun:
    """A run of one model and optimizer, its faults, and the uninterrupted run that it must equal bit for bit."""

    def __init__(self, server: ForkServer, folder: Path, settings: dict[str, Any], kills: int, random: Random) -> None:
        self._server = server
        self._folder = folder
        self._kills = kills
        self._random = random
        self._settings = {**settings, "steps": LEAD + REACH * (kills + 1), "save_every": SAVE_EVERY, "keep": KEEP}
        self._out = folder / "out"
        self._harmed: dict[int, int] = {}
        self._damages: list[Damage] | None = None
        self._outside = folder / "outside"
        self._kept_outside: dict[str, bytes] = {}
        self._reference: list[dict[int, str]] = []
        self._number = 0

    def run(self, tell: Callable[[Outcome], None]) -> Attempts:
        """All attempts, each told when it is known what the next one made of it."""
        alone = {**self._settings, "out": self._folder / "reference", "save_every": 0, "keep": 0}
        plain = yield self._server.start(self._folder / "uninterrupted", alone, None)
        if plain.statuses != [0] * RANKS:
            raise RuntimeError(f"the uninterrupted run failed: {last_line(plain)}")
        self._reference = plain.losses
        pending: Outcome | None = None
        reached = 0
        for number in range(self._kills + 1):
            complete = self._newest()
            fault = draw_fault(self._random, complete) if number < self._kills else None
            if fault is not None and fault.place == "start":
                # It makes no step, so that the next attempt tells what both faults cost.
                begun = yield self._start(fault)
                tell(self._at_start(begun, fault, complete))
                continue
            damage = self._damage() if 0 < number < self._kills and self._due(number) else None
            due = self._newest()
            attempt = yield self._start(fault)
            arrival = self._arrival(attempt, due, damage)
            resumed = attempt.resumed or 0
            if pending is not None:
                # Where a file was damaged after it, the fault itself lost what came after the newest checkpoint.
                lost = reached - (resumed if damage is None else complete)
                tell(replace(pending, lost=lost, allowed=reached - complete, wrong=pending.wrong or arrival))
            if damage is not None:
                costs = {"lost": complete - resumed, "allowed": complete - due}
                tell(Outcome(fault=f"file {damage.way}", where=damage.where, wrong=arrival, **costs))
            pending = self._departure(attempt, fault)
            reached = attempt.reached
            if not set(attempt.sealed[-KEEP:]) <= set(self._whole()):
                raise RuntimeError(f"of the checkpoints of steps {attempt.sealed}, {self._whole()} have a manifest")
        if pending is not None and pending.wrong is not None:
            tell(pending)
        shutil.rmtree(self._out)

    def _start(self, fault: Fault | None) -> Running:
        self._number += 1
        self._kept_outside = contents(self._outside)
        hanging = fault is not None and fault.kind in ("hang", "SIGSTOP")
        settings = {
            **self._settings,
            "out": self._out,
            "resume": self._newest() > 0,
            "hang_timeout": HANG_S if hanging else 120.0,
        }
        joins = fault is None or fault.place != "start" or fault.count >= JOINED
        folder = self._folder / f"attempt{self._number}"
        return self._server.start(folder, settings, fault, _bound(fault), join_s=None if joins else JOIN_S)

    def _due(self, number: int) -> bool:
        """Whether a file is to be damaged before this attempt: before every other one, or more often to get through."""
        left = len(self._damages) if self._damages is not None else 0
        return number % 2 == 1 or 2 * left > self._kills - number

    def _damage(self) -> Damage | None:
        """Damage the newest checkpoint, or a file beside it, where an older one is whole."""
        whole = self._whole()
        if len(whole) < 2:
            return None
        newest = self._out / FOLDER / f"step-{whole[-1]}"
        if self._damages is None:
            self._damages = all_damages(newest)
            self._random.shuffle(self._damages)
        if not self._damages:
            return None
        damage = self._damages.pop()
        following = (whole[-1] // SAVE_EVERY + 1) * SAVE_EVERY
        damage = replace(damage, name=damage.name.replace("NEXT", str(following)))
        do_damage(self._out if damage.beside else newest, damage, self._random, self._outside)
        if not damage.beside:
            self._harmed[whole[-1]] = _changed(newest)
        return damage

    def _whole(self) -> list[int]:
        """The steps of the checkpoints that were sealed and not harmed since."""
        found = [path for path in (self._out / FOLDER).glob("step-*") if not path.is_symlink()]
        folders = {int(path.name.removeprefix("step-")): path for path in found}
        return [
            step
            for step, folder in sorted(folders.items())
            # One that was harmed and is saved again is a new folder.
            if (folder / manifest.NAME).exists() and self._harmed.get(step) != _changed(folder)
        ]

    def _newest(self) -> int:
        return max(self._whole(), default=0)

    def _arrival(self, attempt: Attempt, due: int, damage: Damage | None) -> str | None:
        """What is wrong with how an attempt began and went on: where it resumed, and every loss of it on every rank."""
        if attempt.resumed is None:
            return f"it did not start: {last_line(attempt)}"
        if attempt.resumed < due:
            return f"it went on from step {attempt.resumed}, step {due} was complete"
        skipped = [line for line in attempt.lines[0].splitlines() if "skip" in line]
        if damage is not None and damage.is_within and not any(damage.name in line for line in skipped):
            return f"it did not say that {damage.name} was {damage.way}"
        if contents(self._outside) != self._kept_outside:
            return f"it wrote through a link: {damage}"
        for rank, losses in enumerate(attempt.losses):
            for step, loss in losses.items():
                if loss != self._reference[rank][step]:
                    return f"the loss of step {step} on rank {rank} is not that of the uninterrupted run"
        return None

    def _at_start(self, attempt: Attempt, fault: Fault, complete: int) -> Outcome:
        """What became of an attempt whose fault came before its first step."""
        wrong = ending_fault(attempt, fault)
        if wrong is None and (self._newest() != complete or any(attempt.losses)):
            wrong = f"it left step {self._newest()} of {complete}, having made {attempt.losses}"
        return _outcome(attempt, fault, wrong)

    def _departure(self, attempt: Attempt, fault: Fault | None) -> Outcome | None:
        """How an attempt ended by its fault; None for the last one, which must end well."""
        if fault is None:
            if attempt.statuses == [0] * RANKS and self._same_end():
                return None
            wrong: str | None = f"the last attempt did not end as the uninterrupted run: {last_line(attempt)}"
            return Outcome(fault="none", where="the last attempt", wrong=wrong)
        return _outcome(attempt, fault, ending_fault(attempt, fault))

    def _same_end(self) -> bool:
        ends = [
            json.loads((folder / LOG_NAME).read_text(encoding="utf-8").splitlines()[-1])
            for folder in (self._out, self._folder / "reference")
        ]
        return "val_loss" in ends[0] and ends[0] == ends[1]


def _changed(folder: Path) -> int:
    """When a folder last got or lost a file, in ns."""
    return folder.stat().st_mtime_ns


def _bound(fault: Fault | None) -> float:
    if fault is None:
        return KILL_BOUND_S
    waits = JOIN_S if fault.place == "start" and fault.count < JOINED else 0.0
    return waits + (HANG_BOUND_S if fault.kind in ("hang", "SIGSTOP") else KILL_BOUND_S)


def _outcome(attempt: Attempt, fault: Fault, wrong: str | None) -> Outcome:
    return Outcome(fault=fault.kind, where=fault.where, wrong=wrong, end_s=attempt.end_s, bound_s=_bound(fault))


def draw_fault(random: Random, newest: int) -> Fault:
    """A random kill point in an attempt that goes on after the checkpoint of step ``newest``: at its start, or within
    the ``REACH`` steps after it and the ``LEAD``."""
    rank = random.randrange(RANKS)
    kinds: tuple[Kind, ...] = ("SIGKILL", "SIGTERM", "SIGUSR1", "hang", "SIGSTOP", "differs")
    kind = random.choices(kinds, (74, 8, 6, 4, 3, 5))[0]
    if kind == "differs":
        return Fault(kind=kind, place="start", rank=rank, step=newest, count=random.randrange(len(DIFFERENCES)))
    if random.random() < AT_START:
        # Without a checkpoint there is no load.
        points = len(START_POINTS) - (newest == 0)
        return Fault(kind=kind, place="start", rank=rank, step=newest, count=random.randrange(points))
    at = max(newest, LEAD) + random.randint(1, REACH - SAVE_EVERY)
    if kind in ("hang", "SIGSTOP"):
        return Fault(kind=kind, place="backward", rank=rank, step=at, count=random.randrange(8))
    places: tuple[Place, ...] = ("backward", "exchange", "save", "save", "forward")
    place = random.choice(places)
    count = random.randrange(len(SAVE_POINTS) if place == "save" else 8)
    torn = place == "save" and kind == "SIGKILL" and count == 0 and random.random() < 0.5
    return Fault(kind=kind, place=place, rank=rank, step=at, count=count, torn=torn)
