"""One run that is killed again and again, and what must be true after each of its lives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ds_optim.train import manifest
from ds_optim.train.chaos_damage import Damage, all_damages, do_damage
from ds_optim.train.chaos_faults import SAVE_POINTS, Fault
from ds_optim.train.chaos_ranks import RANKS, Life, Nursery, Running
from ds_optim.train.exits import PREEMPTED, RANK_LOST
from ds_optim.train.resume import FOLDER
from ds_optim.train.run_log import LOG_NAME

SAVE_EVERY = 2
KEEP = 3
LEAD = 7
"""Steps before the first fault: a run without three checkpoints has nothing to lose."""
REACH = 5
"""A fault comes at most so many steps after a life began."""
HANG_S = 6.0
KILL_BOUND_S = 30.0
HANG_BOUND_S = HANG_S + 30.0

#: Yields a life that was started, and is sent it back when it ended.
Lives = Generator[Running, Life, None]

_KILLS = {"SIGKILL": -9, "SIGSTOP": -9}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One fault, and what it cost: ``lost`` steps of at most ``allowed``; ``wrong`` says what was not as promised."""

    fault: str
    where: str
    lost: int
    allowed: int
    end_s: float
    bound_s: float
    wrong: str | None


class Lane:
    """A run of one model and optimizer, its faults, and the uninterrupted run that it must equal bit for bit."""

    def __init__(self, nursery: Nursery, folder: Path, settings: dict[str, Any], kills: int, random: Random) -> None:
        self._nursery = nursery
        self._folder = folder
        self._kills = kills
        self._random = random
        self._settings = {**settings, "steps": LEAD + REACH * (kills + 1), "save_every": SAVE_EVERY, "keep": KEEP}
        self._out = folder / "out"
        self._harmed: dict[int, int] = {}
        self._damages: list[Damage] | None = None
        self._reference: list[dict[int, str]] = []
        self._number = 0

    def run(self, tell: Callable[[Outcome], None]) -> Lives:
        """All lives, each told when it is known what the next one made of it."""
        alone = {**self._settings, "out": self._folder / "reference", "save_every": 0, "keep": 0}
        plain = yield self._nursery.start(self._folder / "uninterrupted", alone, None)
        if plain.statuses != [0] * RANKS:
            raise RuntimeError(f"the uninterrupted run failed: {_last_line(plain)}")
        self._reference = plain.losses
        pending: Outcome | None = None
        reached = 0
        for number in range(self._kills + 1):
            complete = self._newest()
            damage = self._damage() if 0 < number < self._kills and self._due(number) else None
            due = self._newest()
            fault = draw_fault(self._random, max(due, LEAD)) if number < self._kills else None
            life = yield self._start(fault)
            arrival = self._arrival(life, due, damage)
            resumed = life.resumed or 0
            if pending is not None:
                # Where a file was damaged after it, the fault itself lost what came after the newest checkpoint.
                lost = reached - (resumed if damage is None else complete)
                tell(replace(pending, lost=lost, allowed=reached - complete, wrong=pending.wrong or arrival))
            if damage is not None:
                kind = "manifest" if damage.name.endswith(".json") else "shard"
                tell(
                    Outcome(
                        fault=f"file {damage.way}",
                        where=f"{kind} of the newest checkpoint",
                        lost=complete - resumed,
                        allowed=complete - due,
                        end_s=0.0,
                        bound_s=0.0,
                        wrong=arrival,
                    )
                )
            pending = self._departure(life, fault)
            reached = life.reached
            if not set(life.sealed[-KEEP:]) <= set(self._whole()):
                raise RuntimeError(f"of the checkpoints of steps {life.sealed}, {self._whole()} have a manifest")
        if pending is not None and pending.wrong is not None:
            tell(pending)
        shutil.rmtree(self._out)

    def _start(self, fault: Fault | None) -> Running:
        self._number += 1
        hanging = fault is not None and fault.kind in ("hang", "SIGSTOP")
        settings = {
            **self._settings,
            "out": self._out,
            "resume": self._newest() > 0,
            "hang_timeout": HANG_S if hanging else 120.0,
        }
        bound = HANG_BOUND_S if hanging else KILL_BOUND_S
        return self._nursery.start(self._folder / f"life{self._number}", settings, fault, bound)

    def _due(self, number: int) -> bool:
        """Whether a file is to be damaged before this life: before every other one, or more often to get through."""
        left = len(self._damages) if self._damages is not None else 0
        return number % 2 == 1 or 2 * left > self._kills - number

    def _damage(self) -> Damage | None:
        """Damage the newest checkpoint where an older one is whole."""
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
        do_damage(newest, damage, self._random)
        self._harmed[whole[-1]] = _changed(newest)
        return damage

    def _whole(self) -> list[int]:
        """The steps of the checkpoints that were sealed and not harmed since."""
        folders = {int(path.name.removeprefix("step-")): path for path in (self._out / FOLDER).glob("step-*")}
        return [
            step
            for step, folder in sorted(folders.items())
            # One that was harmed and is saved again is a new folder.
            if (folder / manifest.NAME).exists() and self._harmed.get(step) != _changed(folder)
        ]

    def _newest(self) -> int:
        return max(self._whole(), default=0)

    def _arrival(self, life: Life, due: int, damage: Damage | None) -> str | None:
        """What is wrong with how a life began and went on: where it resumed, and every loss of it on every rank."""
        if life.resumed is None:
            return f"it did not start: {_last_line(life)}"
        if life.resumed < due:
            return f"it went on from step {life.resumed}, step {due} was complete"
        if damage is not None and not any(damage.name in line for line in life.lines[0].splitlines() if "skip" in line):
            return f"it did not say that {damage.name} was {damage.way}"
        for rank, losses in enumerate(life.losses):
            for step, loss in losses.items():
                if loss != self._reference[rank][step]:
                    return f"the loss of step {step} on rank {rank} is not that of the uninterrupted run"
        return None

    def _departure(self, life: Life, fault: Fault | None) -> Outcome | None:
        """How a life ended by its fault; None for the last one, which must end well."""
        if fault is None:
            if life.statuses == [0] * RANKS and self._same_end():
                return None
            wrong: str | None = f"the last life did not end as the uninterrupted run: {_last_line(life)}"
            return Outcome(fault="none", where="the last life", lost=0, allowed=0, end_s=0.0, bound_s=0.0, wrong=wrong)
        wrong = ending_fault(life, fault)
        bound = HANG_BOUND_S if fault.kind in ("hang", "SIGSTOP") else KILL_BOUND_S
        return Outcome(
            fault=fault.kind, where=fault.where, lost=0, allowed=0, end_s=life.end_s, bound_s=bound, wrong=wrong
        )

    def _same_end(self) -> bool:
        ends = [
            json.loads((folder / LOG_NAME).read_text(encoding="utf-8").splitlines()[-1])
            for folder in (self._out, self._folder / "reference")
        ]
        return "val_loss" in ends[0] and ends[0] == ends[1]


def _changed(folder: Path) -> int:
    """When a folder last got or lost a file, in ns."""
    return folder.stat().st_mtime_ns


def draw_fault(random: Random, step: int) -> Fault:
    """A random kill point within the ``REACH`` steps after ``step``."""
    rank = random.randrange(RANKS)
    at = step + random.randint(1, REACH - SAVE_EVERY)
    kind = random.choices(("SIGKILL", "SIGTERM", "SIGUSR1", "hang", "SIGSTOP"), (80, 8, 6, 3, 3))[0]
    if kind in ("hang", "SIGSTOP"):
        return Fault(kind=kind, place="backward", rank=rank, step=at, count=random.randrange(8))  # type: ignore[arg-type]
    place = random.choice(("backward", "exchange", "save", "save", "forward"))
    count = random.randrange(len(SAVE_POINTS) if place == "save" else 8)
    torn = place == "save" and kind == "SIGKILL" and count == 0 and random.random() < 0.5
    return Fault(kind=kind, place=place, rank=rank, step=at, count=count, torn=torn)  # type: ignore[arg-type]


def ending_fault(life: Life, fault: Fault) -> str | None:
    """What is wrong with how the ranks ended, or None."""
    if not life.fired:
        return f"the fault did not fire: {_last_line(life)}"
    if life.hung:
        return f"rank {life.hung[0]} did not end"
    if fault.kind in ("SIGTERM", "SIGUSR1"):
        expected = [PREEMPTED] * RANKS
    else:
        expected = [_KILLS.get(fault.kind, RANK_LOST) if rank == fault.rank else RANK_LOST for rank in range(RANKS)]
    if life.statuses != expected:
        return f"the ranks ended with {life.statuses}, not {expected}: {_last_line(life)}"
    other = 1 - fault.rank
    told = [line for line in life.lines[other].splitlines() if line.startswith("ds-optim: error: ")]
    if expected[other] == RANK_LOST and (len(told) != 1 or f"rank {fault.rank} " not in told[0]):
        return f"rank {other} did not name rank {fault.rank} in one line: {told}"
    return None


def _last_line(life: Life) -> str:
    lines = [line.strip() for text in life.lines for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(no output)"
