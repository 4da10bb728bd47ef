"""A training run under way: its steps, validations, checkpoints and end."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_optim.data.batches import BatchShape
from ds_optim.data.load import TextData
from ds_optim.job import exits as ends
from ds_optim.job import models
from ds_optim.job.results import Moment, Observer, TrainResult
from ds_optim.job.run_log import RunLog
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.survival import checkpoint, recut
from ds_optim.survival.inputs import Inputs
from ds_optim.survival.reset import load_without_optimizer
from ds_optim.survival.resume import Choice
from ds_optim.survival.supervise import Supervision
from ds_optim.train.evaluate import evaluate
from ds_optim.train.meters import grad_norm, now, peak_memory, skipped_steps
from ds_optim.train.schedule import WarmupCosine
from ds_optim.train.sequences import parts_of
from ds_optim.train.setup import note_end

_SIGNAL = "a signal"


@dataclass
class Run:
    """One run under way."""

    settings: TrainSettings
    shape: BatchShape
    data: TextData
    engine: Any
    observer: Observer | None
    resumed: Choice | None
    watch: Supervision
    inputs: Inputs
    said: tuple[str, ...]
    name: str
    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    val_losses: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.resumed.checkpoint.step if self.resumed else 0
        self.saved = self.first if self.resumed else None
        self.bad_steps = 0
        self.parts = parts_of(self.settings)
        self.parameters = models.parameter_count(self.engine.module)
        self.log = RunLog(self.settings.out, self.settings.steps, active=ranks.rank() == 0, first_step=self.first)
        self.watchdog = self.watch.watchdog
        self.watch.done = self.first

    def run(self) -> TrainResult:
        """The run from its first step to its end, well or badly."""
        try:
            return self._go()
        finally:
            self.log.close()

    def _go(self) -> TrainResult:
        """Every step that is left, with its validations and checkpoints."""
        schedule = WarmupCosine(self.engine.optimizer, self.settings.warmup, self.settings.steps)
        if self.settings.out is not None:
            checkpoint.require_synchronous(self.engine)
        if self.resumed is not None:
            self.watchdog.tick("loading its checkpoint")
            load = load_without_optimizer if self.settings.reset_optimizer else checkpoint.load
            self.data.batches.restore(load(self.engine, self.resumed.checkpoint))
            ranks.from_first(lambda: recut.forget(self.settings))
            line = checkpoint.follow(self.resumed.original)
            if line is not None:
                self.log.say(f"ds-optim: warning: {line}")
        self._announce()
        started = time.monotonic()
        if self.observer is not None:
            self.observer.on_start(self.engine)
        if self.watch.stop_asked():
            return self._finish(self.first, _SIGNAL)
        self.watchdog.begin_steps()
        done, stop = self.first, None
        for step in range(self.first + 1, self.settings.steps + 1):
            stop = self._step(step, schedule, started)
            self.watch.done = done = step
            last = step == self.settings.steps
            if stop is None and (last or _due(step, self.settings.eval_every)):
                self._validate(step)
            if (last and self.settings.save_every) or _due(step, self.settings.save_every) or stop is not None:
                self._save(step)
            if stop is not None:
                break
        return self._finish(done, stop)

    def _finish(self, done: int, stop: str | None) -> TrainResult:
        """The last validation, and how the run ended; ``stop`` is what ended it early."""
        status, line = ends.FINISHED, f"ended after step {done}"
        if stop is not None:
            status, line = ends.PREEMPTED, f"stopped by {stop} after step {done}, {self._last_save()}"
        elif self.settings.save_every and self.saved != done:
            status, line = ends.SAVE_FAILED, f"ended after step {done}, which could not be saved; {self._last_save()}"
        if status != ends.FINISHED:
            self.log.say(line)
        if done not in self.val_losses and stop is None:
            self._validate(done)
        again = stop in (None, _SIGNAL) and not self.watch.preemption.by_file
        ranks.from_first(lambda: self._note_end(status, done, line, again=again))
        # All that counts is on the disk: a signal that still comes must not change the status.
        self.watch.preemption.over = True
        ranks.from_first(self.watch.preemption.forget_file)
        if self.observer is not None:
            self.observer.on_end(self.engine)
        return self._result(done, status)

    def _last_save(self) -> str:
        return "nothing is saved" if self.saved is None else f"the checkpoint of step {self.saved} is complete"

    def _note_end(self, status: int, done: int, line: str, *, again: bool = True) -> None:
        note_end(self.settings, status, done, line, again=again, tell=self.log.say)

    def _save(self, step: int) -> None:
        """Write a checkpoint where there is a place for it; a failure is told, and the run goes on."""
        if self.settings.out is None:
            return
        self.watchdog.tick(f"the save of step {step}")
        place = self.data.batches.position()
        saved = checkpoint.save(self.engine, self.settings, step, place, self._at, self.inputs, self.name)
        if saved.failure is None:
            self.saved = step
        for line in (saved.failure, *saved.notes):
            if line is not None:
                self.log.warn(step, line)

    def _announce(self) -> None:
        settings, shape = self.settings, self.shape
        for note in self.data.notes:
            self.log.say(note)
        self.log.say(
            f"{settings.preset or settings.model}: {self.parameters:,} parameters,"
            f" {settings.optimizer} at stage {settings.stage}, {settings.dtype}, {shape.world_size} rank(s),"
            f" {shape.tokens:,} tokens a step, {settings.steps * shape.tokens:,} in all"
        )
        if self.resumed is not None:
            for line in (*self.resumed.skipped, *self.resumed.said, *self.said):
                self.log.say(line)
            but = ", its optimizer state left behind" if self.settings.reset_optimizer else ""
            self.log.say(f"resumed from {self.resumed.original.folder} after step {self.first}{but}")

    def _step(self, step: int, schedule: WarmupCosine, started: float) -> str | None:
        """One update and its records; returns what asks the run to end after it, alike on every rank."""
        engine, settings = self.engine, self.settings
        self.watchdog.tick(f"step {step}")
        batches = [windows.to(ranks.device()) for windows in self.data.batches.step(step - 1)]
        lr = schedule.set(engine.global_steps - engine.skipped_steps)
        skipped_before = skipped_steps(engine)
        # Dropout is a function of (seed, step, rank): nothing to save, and a resumed run draws the same.
        torch.manual_seed(_mix(settings.seed, step, self.shape.rank))
        begin = now()
        own = torch.zeros((), dtype=torch.float64, device=ranks.device())
        for windows in batches:
            loss = self.parts.losses(engine, windows).mean()
            self._at("after forward")
            engine.backward(loss * self.parts.scale if self.parts.count > 1 else loss)
            self._at("after backward")
            engine.step()
            own += loss.detach()
        ms = (now() - begin) * 1e3
        # One reduction for the loss, for the clock of rank 0, and for a signal that any rank got: all ranks obey both.
        clock = time.monotonic() - started if ranks.rank() == 0 else 0.0
        loss_sum, elapsed, signalled = ranks.sums([float(own), clock, self.watch.preemption.wanted()])
        mean = loss_sum / (self.shape.accumulation * ranks.world_size())
        skipped = skipped_steps(engine) > skipped_before
        self.losses.append(mean)
        self.times_ms.append(ms)
        self.log.step(
            {
                "step": step,
                "loss": mean,
                "lr": lr,
                "grad_norm": grad_norm(engine),
                "ms": ms,
                "tokens_per_s": self.shape.tokens / ms * 1e3,
                "skipped": skipped,
            }
        )
        if self.observer is not None:
            self.observer.on_step(engine, step, mean, ms)
        self._count_bad(step, skipped or not math.isfinite(mean))
        if signalled > 0:
            return _SIGNAL
        if settings.time_limit_s is not None and elapsed >= settings.time_limit_s and step < settings.steps:
            return f"its time limit of {settings.time_limit_s:g} s"
        return None

    def _count_bad(self, step: int, bad: bool) -> None:
        """Raise ``BadNumbers`` on every rank after ``max_skips`` bad steps in a row."""
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if bad and self.bad_steps == 1:
            self.log.warn(step, f"step {step} was skipped, or its loss is not finite")
        if self.settings.max_skips and self.bad_steps >= self.settings.max_skips:
            line = (
                f"steps {step - self.bad_steps + 1} to {step} were all skipped or had no finite loss (--max-skips"
                f" {self.settings.max_skips}); {self._last_save()}. Try a lower --lr, a --clip, --dtype bf16 in"
                " place of fp16, and look at the text of these steps; --max-skips 0 never stops"
            )
            ranks.from_first(lambda: self._note_end(ends.BAD_NUMBERS, step, line))
            raise ends.BadNumbers(line)

    def _at(self, moment: Moment) -> None:
        self.watchdog.tick(shared=moment != "file written")
        if self.observer is not None:
            self.observer.on_moment(self.engine, moment)

    def _validate(self, step: int) -> None:
        self.watchdog.tick(f"the validation of step {step}")
        loss = evaluate(self.engine, self.data.validation, self.shape, self.settings.eval_batches, self.parts)
        self.val_losses[step] = loss
        entropy = self.data.unigram_entropy
        record = {"step": step, "val_loss": loss, "unigram_entropy": entropy, "entropy_ratio": loss / entropy}
        self.log.validation(record, self.engine)

    def _result(self, done: int, status: int) -> TrainResult:
        # A resumed run that has nothing left to do has no times.
        ms = statistics.median(self.times_ms) if self.times_ms else float("nan")
        return TrainResult(
            # A run that is ended early has no time for a validation.
            val_loss=self.val_losses.get(done, float("nan")),
            unigram_entropy=self.data.unigram_entropy,
            ms_per_step=ms,
            tokens_per_s=self.shape.tokens / ms * 1e3,
            steps=done,
            parameters=self.parameters,
            losses=self.losses,
            val_losses=self.val_losses,
            skipped_steps=skipped_steps(self.engine),
            peak_memory_bytes=peak_memory(),
            status=status,
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _mix(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
