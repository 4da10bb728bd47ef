"""Runs under every launcher that this machine has, told to end at any time after their start, and started again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import ds_optim
from ds_optim.chaos.killed_run import Attempts, Outcome
from ds_optim.chaos.terminal import Command, Done, Signalled, line_count
from ds_optim.job.exits import END_NAME, FINISHED, PREEMPTED
from ds_optim.job.run_log import LOG_NAME
from ds_optim.machine.forked import free_port
from ds_optim.survival import manifest
from ds_optim.survival.resume import FOLDER

When = Literal["as it starts", "in training"]

_SCRIPTS = Path(ds_optim.__file__).parents[1] / "launch"
_MODEL = "--optimizer lion --stage 1 --dtype fp32 --seq-len 16 --micro-batch 2 --eval-batches 1 --steps 300"
_RANKS = 2
_SIGNALS: tuple[Signalled, ...] = ("SIGTERM", "SIGUSR1", "SIGHUP", "Ctrl-C")
_TRAINED_S = 1.5
_LAST_LINES = 5
"""Of a log: a run that is told to end when no more are missing may be done before it can."""
BOUND_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A way to start a run: ``needs`` are commands and modules that must be here."""

    name: str
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What this machine lacks for it; None where it can be started."""
        if self.name != "ds-optim train" and not (_SCRIPTS / self.name).exists():
            return f"{_SCRIPTS} is not here"
        from importlib.util import find_spec

        return next((f"no {name}" for name in self.needs if not shutil.which(name) and find_spec(name) is None), None)

    def command(self, out: Path, model: Path, *, resume: bool) -> list[str]:
        """Start, or go on with, the run in ``out``."""
        arguments = ["--model", str(model), *_MODEL.split(), "--out", str(out)]
        if self.name == "ds-optim train":
            return [sys.executable, "-m", "ds_optim", "train", *arguments, *(["--resume"] if resume else [])]
        script = ["bash", str(_SCRIPTS / self.name)]
        if self.name == "requeue.sh":
            port = ["--master_port", str(free_port())]
            return [*script, str(out), "deepspeed", "--num_gpus", str(_RANKS), *port, *_TRAIN, *arguments]
        return [*script, "--ranks", str(_RANKS), *arguments]


_TRAIN = ("--module", "ds_optim", "train")
LAUNCHERS = (
    Launcher(name="ds-optim train"),
    Launcher(name="local.sh", needs=("deepspeed",)),
    Launcher(name="torchrun.sh", needs=("torchrun",)),
    Launcher(name="openmpi.sh", needs=("mpirun", "mpi4py")),
    Launcher(name="requeue.sh", needs=("deepspeed",)),
)


class Launched:
    """One run under one launcher: its attempts, each told to end at a random time, and the one that nobody disturbs."""

    def __init__(self, launcher: Launcher, folder: Path, model: Path, times: int, random: Random) -> None:
        self._launcher = launcher
        self._folder = folder
        self._model = model
        self._times = times
        self._random = random
        self._out = folder / "out"

    def attempts(self, tell: Callable[[Outcome], None]) -> Attempts:
        """All attempts; each must end with 75 and everything saved, and the losses be those of the undisturbed run."""
        alone = self._folder / "alone"
        undisturbed: Done = yield self._start(alone, None, 0.0)
        if undisturbed.status != FINISHED:
            raise RuntimeError(f"{self._launcher.name} ended with {undisturbed.status}: {undisturbed.text[-500:]}")
        reference, start_s = losses_of(alone), undisturbed.first_step_s
        for _ in range(self._times):
            when: When = self._random.choice(("as it starts", "in training"))
            after_s = self._random.uniform(0.0, start_s if when == "as it starts" else _TRAINED_S)
            told = self._random.choice(_SIGNALS)
            before = end_of(self._out)
            done: Done = yield self._start(self._out, told, after_s, trained=when == "in training")
            wrong = self._wrong(done, told, before, reference)
            name = f"{self._launcher.name}, {when}"
            tell(Outcome(fault=told, where=name, wrong=wrong, end_s=done.end_s, bound_s=BOUND_S))
            if done.status == FINISHED:
                shutil.rmtree(self._out, ignore_errors=True)  # the next one has all its steps before it again
        last: Done = yield self._start(self._out, None, 0.0)
        if last.status != FINISHED or losses_of(self._out) != reference:
            wrong = f"the last attempt ended with {last.status}, or with other losses: {last.text[-300:]}"
            tell(Outcome(fault="none", where=f"{self._launcher.name}, the last attempt", wrong=wrong))

    def _start(self, out: Path, told: Signalled | None, after_s: float, *, trained: bool = False) -> Command:
        resume = any((out / FOLDER).glob(f"step-*/{manifest.NAME}"))
        command = self._launcher.command(out, self._model, resume=resume)
        return Command(command, self._folder, out / LOG_NAME, told, after_s, trained=trained)

    def _wrong(self, done: Done, told: Signalled, before: str | None, reference: dict[int, Any]) -> str | None:
        """What is not as promised of an attempt that was told to end."""
        end = json.loads(end_of(self._out) or "{}")
        step = end.get("step", 0)
        if done.status == FINISHED:
            told_late = done.told_s is None or line_count(self._out / LOG_NAME) - done.told_lines <= _LAST_LINES
            whole = losses_of(self._out) == reference
            return None if told_late and whole else f"it went on to its end when it was told to, {done.text[-300:]}"
        if done.hung or done.left:
            return f"it did not end: {done.left} were left, {done.text[-300:]}"
        if done.status != PREEMPTED and not (done.is_dead_of(told) and end_of(self._out) == before):
            return f"it ended with {done.status}: {done.text[-300:]}"
        if end_of(self._out) != before and end.get("status") != PREEMPTED:
            return f"{END_NAME} says {end}"
        if step and not (self._out / FOLDER / f"step-{step}" / manifest.NAME).exists():
            return f"step {step} is not saved"
        made = losses_of(self._out)
        if max(made, default=0) > step or any(reference[at] != loss for at, loss in made.items()):
            return f"step {max(made)} was made and {step} saved, or a loss is not that of the undisturbed run"
        # torchrun shows one of its own for every rank that ends with a status.
        if "Traceback" in done.text and self._launcher.name != "torchrun.sh":
            return f"it left a traceback: {done.text[-500:]}"
        return None


def losses_of(out: Path) -> dict[int, Any]:
    """Training losses by step, and the last validation's as of the step after, as a run's log has them."""
    path = out / LOG_NAME
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return found | {line["step"] + 1: line["val_loss"] for line in lines if "val_loss" in line}


def end_of(out: Path) -> str | None:
    path = out / END_NAME
    return path.read_text(encoding="utf-8") if path.exists() else None
