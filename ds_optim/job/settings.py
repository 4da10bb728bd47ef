"""What a training run is told: one validated record, made of flags and of an optional DeepSpeed JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ds_optim.errors import UserError, did_you_mean
from ds_optim.job.presets import MODEL_DEFAULTS, PRESETS, tuned_params
from ds_optim.zero.complaints import reword
from ds_optim.zero.reading import parse_json

INPUTS = ("text", "model", "tokenizer", "polar")
"""What a run reads besides its settings (``ds_optim.survival.inputs``)."""


class TrainSettings(BaseModel):
    """One training run. Every field has a flag of the same name in ``ds-optim train``.

    ``tuned`` starts from the preset's tuned optimizer parameters; off, what is not given is the optimizer's
    own default. ``deepspeed`` holds whatever else the DeepSpeed JSON says; it reaches ``ds_optim.initialize``
    as it is. ``accept`` names inputs that may have changed since the checkpoint. 0 means "all" for ``keep``, "never"
    for ``hang_timeout`` (seconds) and ``max_skips`` (steps).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    preset: str | None = "qwen3-tiny"
    model: str | None = None
    data: str = "shakespeare"
    tokenizer: str = "bytes"
    seq_len: int = Field(128, ge=2)
    micro_batch: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    steps: int = Field(100, ge=1)
    warmup: int = Field(10, ge=0)
    optimizer: str = "lion_muon"
    optimizer_params: dict[str, Any] = Field(default_factory=dict)
    lr: float | None = Field(None, ge=0, allow_inf_nan=False)
    tuned: bool = True
    stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    clip: float = Field(1.0, ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)
    eval_every: int = Field(0, ge=0)
    eval_batches: int = Field(8, ge=1)
    save_every: int = Field(0, ge=0)
    keep: int = Field(0, ge=0)
    resume: bool = False
    reset_optimizer: bool = False
    accept: tuple[str, ...] = ()
    force: bool = False
    out: Path | None = None
    tensorboard: bool = False
    zero_init: bool = False
    time_limit_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    hang_timeout: float = Field(600.0, ge=0, allow_inf_nan=False)
    max_skips: int = Field(50, ge=0)
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """Where the run does not say how long a sequence is, the model's preset does."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if filled.get("model") is not None:
            if filled.get("preset") is not None:
                raise ValueError("give a preset or a model, not both")
            filled["preset"] = None
            defaults: dict[str, Any] = dict(MODEL_DEFAULTS)
        else:
            preset = PRESETS.get(filled.get("preset", "qwen3-tiny"))
            if preset is None:
                return filled
            defaults = {name: getattr(preset, name) for name in MODEL_DEFAULTS}
        steps = filled.get("steps", 100)
        defaults["warmup"] = default_warmup(steps) if isinstance(steps, int) and steps > 0 else 0
        return {**defaults, **filled}

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}{did_you_mean(value, PRESETS)}; there are {', '.join(PRESETS)}")
        return value

    @field_validator("accept", mode="before")
    @classmethod
    def _known_inputs(cls, value: Any) -> Any:
        names = split_list(value) if isinstance(value, str) else value
        for name in names if isinstance(names, (list, tuple)) else ():
            if name not in INPUTS:
                raise ValueError(
                    f"unknown input {name!r}{did_you_mean(str(name), INPUTS)}; there are {', '.join(INPUTS)}"
                )
        return names

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        kind, _, rest = value.partition(":")
        if value == "bytes" or (kind == "hf" and rest):
            return value
        if kind == "bpe" and rest.isdecimal() and int(rest) > 256:
            return value
        raise ValueError(f"unknown tokenizer {value!r}; write bytes, bpe:N with N over 256, or hf:DIRECTORY")

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.warmup >= self.steps > 1:
            raise ValueError(f"warmup of {self.warmup} steps leaves nothing of {self.steps} steps; make it smaller")
        if self.lr is not None and "lr" in self.optimizer_params:
            raise ValueError("the learning rate stands in lr and in optimizer_params; keep one")
        if self.zero_init and self.stage != 3:
            raise ValueError("zero_init needs stage 3: the other stages keep whole parameters on every rank")
        needing_out = [
            name for name in ("resume", "tensorboard", "save_every") if getattr(self, name) and self.out is None
        ]
        if self.reset_optimizer and not self.resume:
            raise ValueError("reset_optimizer needs resume: without it there is no optimizer to reset")
        if self.accept and not self.resume:
            raise ValueError("accept needs resume: without it there is nothing to differ from")
        if self.force and self.resume:
            raise ValueError("force starts anew and resume goes on: give one of them")
        if needing_out:
            raise ValueError(f"{needing_out[0]} needs out, the folder that the run writes to")
        return self

    def resolved_params(self) -> dict[str, Any]:
        """The optimizer's parameters: the preset's tuned ones, then the run's own, then ``lr``; the run's seed is that
        of an optimizer's own noise too, so that the seeds of a study do not share it."""
        from ds_optim.zero.config import is_ours

        tuned = tuned_params(self.preset, self.optimizer) if self.tuned else {}
        params = {**tuned, **self.optimizer_params}
        if self.lr is not None:
            params["lr"] = self.lr
        if self.seed and is_ours(self.optimizer):
            params.setdefault("seed", self.seed % 2**32)
        return params

    def trajectory(self) -> dict[str, Any]:
        """What decides the losses: a resumed run must agree with its checkpoint in all of it."""
        unrelated = {
            "resume",
            "reset_optimizer",
            "accept",
            "force",
            "out",
            "tensorboard",
            "time_limit_s",
            "hang_timeout",
            "max_skips",
            "save_every",
            "keep",
            "eval_every",
            "eval_batches",
        }
        return self.model_dump(mode="json", exclude=unrelated)


def default_warmup(steps: int) -> int:
    """Steps of warmup where nothing is said of them."""
    return steps // 10


def make_settings(**given: Any) -> TrainSettings:
    """A validated record; raises ``UserError`` with one line."""
    for name, value in given.items():
        if not _is_text(value):
            raise UserError(f"{name} holds characters that are no text in UTF-8: rename the file, or write it as UTF-8")
    try:
        return TrainSettings(**given)
    except ValidationError as error:
        raise UserError(reword(error, TrainSettings)) from None


def _is_text(value: Any) -> bool:
    """Whether it can be written again: half a surrogate pair, which a wrong byte becomes, cannot."""
    try:
        json.dumps(value, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (TypeError, ValueError, RecursionError):
        pass  # the fields' own checks say what is wrong
    return True


def parse_object(text: str, flag: str) -> dict[str, Any]:
    """The JSON object that a flag holds."""
    value = parse_json(text, flag)
    if not isinstance(value, dict):
        raise UserError(f"{flag} takes a JSON object such as '{{\"lr\": 0.001}}', not {text!r}")
    return value


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]
