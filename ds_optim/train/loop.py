"""Training: settings in, a trained model's losses out."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

from ds_optim.data.batches import BatchShape
from ds_optim.data.load import load_data
from ds_optim.job import exits as ends
from ds_optim.job.deepspeed_json import data_ranks
from ds_optim.job.results import Observer, TrainResult
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.survival.identity import RUN, new_id
from ds_optim.survival.inputs import check_inputs, read_inputs
from ds_optim.survival.preemption import Preemption
from ds_optim.survival.resume import to_resume
from ds_optim.survival.supervise import Supervision, supervised
from ds_optim.train.run import Run
from ds_optim.train.sequences import check_parts
from ds_optim.train.setup import check_config_of, check_dtype, note_end, note_settings, open_out, start_engine


def train(
    settings: TrainSettings, observer: Observer | None = None, preemption: Preemption | None = None
) -> TrainResult:
    """Train a model as ``settings`` say; collective, with equal settings on every rank.

    ``preemption`` is the caller's, where it hears signals already. Raises ``UserError`` on every rank for a mistake
    that any rank finds, and ``RunStopped`` for a run that cannot go on: ``BadNumbers``, ``Preempted`` before its first
    step, or ``RankLost``, after which the process group is not to be used again. Where a rank hangs, the processes of
    all of them end (``ds_optim.survival.watchdog``).
    """
    run: Run | None = None
    try:
        heard = nullcontext(preemption) if preemption is not None else Preemption()
        with heard as asked, supervised(settings, asked) as watch:
            run = _prepare(settings, observer, watch)
            result = run.run()
    except ends.RankLost:
        raise
    except Exception:
        if run is not None:
            run.engine.destroy()
        raise
    # Engines hold hooks and communication buffers beyond their last reference.
    run.engine.destroy()
    return result


def _prepare(settings: TrainSettings, observer: Observer | None, watch: Supervision) -> Run:
    """Everything before the first step. Collective."""
    watch.watchdog.tick("the checks of its settings")
    ranks.same_everywhere("the settings", hashlib.sha256(settings.model_dump_json().encode()).hexdigest())
    ranks.together(lambda: check_dtype(settings))
    ranks.together(lambda: check_config_of(settings))
    ranks.together(lambda: check_parts(settings))
    ranks.from_first(lambda: open_out(settings, watch.lock))
    watch.watchdog.tick("the look at its checkpoints")
    resumed = to_resume(settings)
    if resumed is not None:
        settings = settings.model_copy(update={"warmup": resumed.warmup})
        watch.done = resumed.checkpoint.step
    before = resumed.checkpoint.notes.get(RUN) if resumed is not None else None
    run: str = before or ranks.from_first(new_id)
    ranks.from_first(lambda: note_settings(settings, run))
    watch.begun = True
    readers = data_ranks(settings.deepspeed, ranks.world_size())  # those that share a batch are neighbours
    shape = BatchShape(
        seq_len=settings.seq_len,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        rank=ranks.rank() * readers // ranks.world_size(),
        world_size=readers,
    )
    watch.watchdog.tick("reading the text")
    data = load_data(settings, shape)
    if watch.stop_asked():
        line = "stopped by a signal before the first step; earlier checkpoints are as they were"
        again = not watch.preemption.by_file
        ranks.from_first(lambda: note_end(settings, ends.PREEMPTED, watch.done, line, again=again))
        raise ends.Preempted(line)
    watch.watchdog.tick("making the engine")
    engine = start_engine(settings, data)
    try:
        inputs = read_inputs(data, engine)
        said = check_inputs(settings, inputs, resumed.original) if resumed is not None else ()
    except Exception:
        engine.destroy()
        raise
    return Run(
        settings=settings,
        shape=shape,
        data=data,
        engine=engine,
        observer=observer,
        resumed=resumed,
        watch=watch,
        inputs=inputs,
        said=said,
        name=run,
    )
