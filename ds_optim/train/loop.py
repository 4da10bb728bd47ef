"""The training loop: settings in, a trained model's losses out."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.train import checkpoint, models, ranks
from ds_optim.train.batches import BatchShape
from ds_optim.train.data import TextData, load_data
from ds_optim.train.deepspeed_json import deepspeed_config
from ds_optim.train.evaluate import evaluate
from ds_optim.train.results import Moment, Observer, TrainResult
from ds_optim.train.run_log import RunLog
from ds_optim.train.schedule import WarmupCosine
from ds_optim.train.settings import TrainSettings


def train(settings: TrainSettings, observer: Observer | None = None) -> TrainResult:
    """Train a model as ``settings`` say; collective, with equal settings on every rank.

    Raises ``UserError`` on every rank for a mistake that any rank finds.
    """
    ranks.join()
    ranks.same_everywhere("the settings", hashlib.sha256(settings.model_dump_json().encode()).hexdigest())
    ranks.together(lambda: _check_dtype(settings))
    resumed = ranks.from_first(lambda: _open_out(settings))
    shape = BatchShape(
        seq_len=settings.seq_len,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )
    data = load_data(settings, shape)
    engine = _start_engine(settings, data)
    run = _Run(settings=settings, shape=shape, data=data, engine=engine, observer=observer, resumed=resumed)
    try:
        return run.go()
    finally:
        run.log.close()
        # Engines hold hooks and communication buffers beyond their last reference.
        engine.destroy()


@dataclass
class _Run:
    """One run under way."""

    settings: TrainSettings
    shape: BatchShape
    data: TextData
    engine: Any
    observer: Observer | None
    resumed: checkpoint.Checkpoint | None
    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    val_losses: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.resumed.step if self.resumed else 0
        self.parameters = models.parameter_count(self.engine.module)
        self.log = RunLog(self.settings.out, self.settings.steps, active=self.shape.rank == 0, first_step=self.first)

    def go(self) -> TrainResult:
        """Every step that is left, with its validations and checkpoints."""
        schedule = WarmupCosine(self.engine.optimizer, self.settings.warmup, self.settings.steps)
        if self.resumed is not None:
            self.data.batches.restore(checkpoint.load(self.engine, self.resumed))
        self._announce()
        started = time.monotonic()
        if self.observer is not None:
            self.observer.on_start(self.engine)
        done = self.first
        for step in range(self.first + 1, self.settings.steps + 1):
            out_of_time = self._step(step, schedule, started)
            done = step
            last = out_of_time or step == self.settings.steps
            if last or _due(step, self.settings.eval_every):
                self._validate(step)
            if (last and self.settings.save_every) or _due(step, self.settings.save_every):
                checkpoint.save(self.engine, self.settings, step, self.data.batches.position())
            if out_of_time:
                self.log.say(f"the time limit of {self.settings.time_limit_s:g} s is reached at step {step}")
                break
        if done not in self.val_losses:
            self._validate(done)
        if self.observer is not None:
            self.observer.on_end(self.engine)
        return self._result(done)

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
            self.log.say(f"resumed from {self.resumed.folder} after step {self.first}")

    def _step(self, step: int, schedule: WarmupCosine, started: float) -> bool:
        """One update and its records; returns whether the time is up, the same on every rank."""
        engine, settings = self.engine, self.settings
        batches = [windows.to(ranks.device()) for windows in self.data.batches.step(step - 1)]
        lr = schedule.set(engine.global_steps - engine.skipped_steps)
        skipped_before = engine.skipped_steps
        # Dropout is a function of (seed, step, rank): nothing to save, and a resumed run draws the same.
        torch.manual_seed(_mix(settings.seed, step, self.shape.rank))
        begin = _now()
        own = torch.zeros((), dtype=torch.float64, device=ranks.device())
        for windows in batches:
            loss = models.next_token_losses(engine, windows).mean()
            self._at("after forward")
            engine.backward(loss)
            self._at("after backward")
            engine.step()
            own += loss.detach()
        ms = (_now() - begin) * 1e3
        # One reduction for the loss and for the clock of rank 0, which all ranks obey.
        clock = time.monotonic() - started if self.shape.rank == 0 else 0.0
        loss_sum, elapsed = ranks.sums([float(own), clock])
        mean = loss_sum / (self.shape.accumulation * self.shape.world_size)
        self.losses.append(mean)
        self.times_ms.append(ms)
        self.log.step(
            {
                "step": step,
                "loss": mean,
                "lr": lr,
                "grad_norm": _grad_norm(engine),
                "ms": ms,
                "tokens_per_s": self.shape.tokens / ms * 1e3,
                "skipped": engine.skipped_steps > skipped_before,
            }
        )
        if self.observer is not None:
            self.observer.on_step(engine, step, mean, ms)
        return settings.time_limit_s is not None and elapsed >= settings.time_limit_s

    def _at(self, moment: Moment) -> None:
        if self.observer is not None:
            self.observer.on_moment(self.engine, moment)

    def _validate(self, step: int) -> None:
        loss = evaluate(self.engine, self.data.validation, self.shape, self.settings.eval_batches)
        self.val_losses[step] = loss
        entropy = self.data.unigram_entropy
        record = {"step": step, "val_loss": loss, "unigram_entropy": entropy, "entropy_ratio": loss / entropy}
        self.log.validation(record, self.engine)

    def _result(self, done: int) -> TrainResult:
        # A resumed run that has nothing left to do has no times.
        ms = statistics.median(self.times_ms) if self.times_ms else float("nan")
        return TrainResult(
            val_loss=self.val_losses[done],
            unigram_entropy=self.data.unigram_entropy,
            ms_per_step=ms,
            tokens_per_s=self.shape.tokens / ms * 1e3,
            steps=done,
            parameters=self.parameters,
            losses=self.losses,
            val_losses=self.val_losses,
            skipped_steps=self.engine.skipped_steps,
            peak_memory_bytes=_peak_memory(),
        )


def _open_out(settings: TrainSettings) -> checkpoint.Checkpoint | None:
    """Make and try the output folder; return the checkpoint to go on from."""
    if settings.out is None:
        return None
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        probe = settings.out / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to --out {str(settings.out)!r}: {error.strerror}; give a folder that you may write to"
        ) from None
    resumed = checkpoint.to_resume(settings)
    record = json.loads(settings.model_dump_json())
    (settings.out / "settings.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return resumed


def _check_dtype(settings: TrainSettings) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
    }
    if not supported[settings.dtype]:
        usable = " or ".join(name for name, usable in supported.items() if usable)
        raise UserError(f"this accelerator ({accelerator.device_name()}) has no {settings.dtype}; use --dtype {usable}")


def _start_engine(settings: TrainSettings, data: TextData) -> Any:
    """The model of the run in a DeepSpeed engine."""
    import ds_optim

    config = deepspeed_config(settings, ranks.world_size())

    def build() -> torch.nn.Module:
        if settings.preset is not None:
            shape = models.preset_config(settings.preset, data.vocab_size, settings.seq_len)
        else:
            assert settings.model is not None
            shape = models.model_config(settings.model, data.vocab_size)
        # Not under `together` with zero_init: making the weights is a collective by itself.
        return models.build_model(shape, settings.seed, zero_config=config if settings.zero_init else None)

    model = build() if settings.zero_init else ranks.together(build)
    engine, *_ = ds_optim.initialize(model=model, config=config)
    return engine


def _grad_norm(engine: Any) -> float | None:
    """The norm of the step's gradient before clipping, where this stage keeps one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _now() -> float:
    """A clock in seconds that waits for the device."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
    return time.perf_counter()


def _peak_memory() -> int:
    """This rank's peak in bytes: of the allocator, or of the resident set where there is none."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    import resource
    import sys

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _mix(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
