"""What a run needs before its first step: a folder to write to, a supported dtype, a model in an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ds_optim.data.load import TextData
from ds_optim.errors import UserError
from ds_optim.job import exits as ends
from ds_optim.job import models
from ds_optim.job.architectures import TEXT_DECODER, is_encoder_decoder, is_text_decoder
from ds_optim.job.deepspeed_json import deepspeed_config
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.machine.extensions import load_op
from ds_optim.machine.files import write_atomic
from ds_optim.machine.run_lock import RunLock
from ds_optim.survival.identity import RUN
from ds_optim.survival.inputs import model_digest
from ds_optim.train.sequences import mpu_of
from ds_optim.zero.auto import fill_auto, hidden_size_of
from ds_optim.zero.config import is_ours
from ds_optim.zero.files import check_files_op
from ds_optim.zero.refused import is_nvme
from ds_optim.zero.support import check_config
from ds_optim.zero.values import understood

SETTINGS_NAME = "settings.json"


def open_out(settings: TrainSettings, lock: RunLock) -> None:
    """Make and try the output folder, and take its lock; nothing that is there changes."""
    if settings.out is None:
        return
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        lock.take(settings.out)
    except OSError as error:
        raise UserError(
            f"cannot write to --out {str(settings.out)!r}: {error.strerror}; give a folder that you may write to"
        ) from None


def note_end(
    settings: TrainSettings,
    status: int,
    step: int,
    line: str,
    *,
    again: bool = True,
    tell: Callable[[str], None] = print,
) -> None:
    """Leave how the run ended beside what it wrote; where that fails, it is told."""
    try:
        ends.note_end(settings.out, status, step, line, again=again)
    except OSError as error:
        tell(f"cannot write {ends.END_NAME}: {error.strerror}")


def note_settings(settings: TrainSettings, run: str) -> None:
    """Leave the settings and the name of the run beside what it writes, which from here on is another than was there.

    Raises ``UserError`` where that cannot be written.
    """
    if settings.out is not None:
        record = {**json.loads(settings.model_dump_json()), RUN: run}
        try:
            (settings.out / ends.END_NAME).unlink(missing_ok=True)
            write_atomic(settings.out / SETTINGS_NAME, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {SETTINGS_NAME} and {ends.END_NAME} in --out {str(settings.out)!r}: {error.strerror};"
                " move what is there under these names away"
            ) from None


def check_dtype(settings: TrainSettings) -> None:
    """Raise ``UserError`` where the accelerator does not compute in the run's dtype."""
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


def check_config_of(settings: TrainSettings) -> None:
    """Refuse what the JSON asks for and the optimizers here cannot be right under, before a text or a model is read.

    Raises:
        UserError: with what to write instead.
    """
    if is_ours(settings.optimizer):
        config = deepspeed_config(settings, ranks.world_size())
        check_config(config)
        check_files_op(config)


def start_engine(settings: TrainSettings, data: TextData) -> Any:
    """The model of the run in a DeepSpeed engine."""
    import ds_optim

    config = deepspeed_config(settings, ranks.world_size())
    ranks.together(lambda: _load_ops(config))

    def read() -> Any:
        shape = _model_config(settings, data)
        if settings.zero_init:  # DeepSpeed reads the config twice then: here first
            config.update(understood(config))
            fill_auto(config, hidden_size_of(shape))
        return shape

    def build() -> torch.nn.Module:
        encodes = is_encoder_decoder(shape)
        made = models.build_model(shape, settings.seed, zero_config=config if settings.zero_init else None)
        if ranks.rank() == 0 and is_text_decoder(shape, made, encodes):
            print(f"ds-optim: {settings.model}: {type(made).__name__}, {TEXT_DECODER}", flush=True)
        return made

    shape = ranks.together(read)
    # With zero_init, ranks that build different models wait for each other.
    ranks.same_everywhere("the model's config", model_digest(shape))
    # Not under `together` with zero_init: making the weights is a collective by itself.
    model = build() if settings.zero_init else ranks.together(build)
    mpu = ranks.together(lambda: mpu_of(model, settings))
    engine, *_ = ds_optim.initialize(model=model, config=config, mpu=mpu)
    return engine


def _model_config(settings: TrainSettings, data: TextData) -> Any:
    if settings.preset is not None:
        return models.preset_config(settings.preset, data.vocab_size, settings.seq_len)
    assert settings.model is not None
    return models.model_config(settings.model, data.vocab_size)


def _load_ops(config: dict[str, Any]) -> None:
    """Have the ops of DeepSpeed's AdamW, and of files on NVMe, built where a build that is killed stops nobody."""
    optimizer, zero = config.get("optimizer"), config.get("zero_optimization")
    # What is no section is for who reads the config to say.
    if not isinstance(optimizer, dict) or not isinstance(zero, dict):
        return
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and is_nvme(offload.get("device")):
        load_op("AsyncIOBuilder")
    if str(optimizer.get("type")).lower() in ("adam", "adamw"):
        load_op("CPUAdamBuilder" if zero.get("offload_optimizer") else "FusedAdamBuilder")
