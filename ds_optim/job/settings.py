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
WITHOUT_FLAG = ("tuned", "deepspeed")
"""Fields of the settings that a DeepSpeed JSON or another command fills."""


class TrainSettings(BaseModel):
    """One training run. Every field but ``WITHOUT_FLAG`` is a flag of ``ds-optim train``, with its words.

    Without ``tuned`` what is not given is the optimizer's own default. ``accept`` names inputs that may have changed
    since the checkpoint. 0 means "all" for ``keep``, "never" for ``hang_timeout`` (seconds) and ``max_skips`` (steps).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    preset: str | None = Field("qwen3-tiny", description="qwen3-tiny (default) or qwen3-134m.")
    model: str | None = Field(
        None,
        description="In place of a preset: a folder, config.json or hub name of a causal LM.",
    )
    data: str = Field(
        "shakespeare",
        description=(
            "shakespeare (shipped, default); a file, folder or glob of text, JSON, CSV, parquet or arrow, plain "
            "or as gz, xz, bz2, zst; or hub:REPO[:CONFIG[:SPLIT]]."
        ),
    )
    tokenizer: str = Field("bytes", description="bytes, bpe:N (trained on the data), or hf:DIRECTORY.")
    seq_len: int = Field(128, ge=2, description="Tokens a sequence.")
    micro_batch: int = Field(8, ge=1, description="Sequences a rank takes at once.")
    accumulation: int = Field(1, ge=1, description="Micro-batches a step.")
    steps: int = Field(
        100,
        ge=1,
        description="Updates; the cosine ends at 0 there. More with --resume extend a run. [100]",
    )
    warmup: int = Field(10, ge=0, description="Steps of linear warmup. [a tenth]")
    optimizer: str = Field("lion_muon", description="lion_muon (default), lion, muon, adamw, deepspeed:Muon, ...")
    optimizer_params: dict[str, Any] = Field(
        default_factory=dict,
        description='Its parameters as JSON: \'{"lr": 0.001, "period": 2}\'.',
    )
    lr: float | None = Field(None, ge=0, allow_inf_nan=False, description="Learning rate, over the preset's tuned one.")
    tuned: bool = Field(
        True,
        description="Start from the preset's tuned parameters of the optimizer; off where a JSON names the optimizer.",
    )
    stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage, 0 to 3. [1]")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="bf16 (default), fp32 or fp16.")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="Gradient norm to clip at; 0 is off. [1.0]")
    seed: int = Field(0, ge=0, lt=2**63, description="Of weights, order and dropout. [0]")
    eval_every: int = Field(0, ge=0, description="Steps between validations; 0: at the end alone. [0]")
    eval_batches: int = Field(8, ge=1, description="Global batches a validation. [8]")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints, and one at the end; 0: none. [0]")
    keep: int = Field(0, ge=0, description="Newest checkpoints to keep; 0: all of them. [0]")
    resume: bool = Field(False, description="Go on from the newest complete checkpoint in --out.")
    reset_optimizer: bool = Field(
        False,
        description="With --resume: keep weights, schedule and place in the text; any --optimizer.",
    )
    accept: tuple[str, ...] = Field(
        (),
        description="With --resume: go on though these changed: of text, model, tokenizer, polar.",
    )
    force: bool = Field(False, description="Start anew where --out holds the log of an earlier run, and replace it.")
    out: Path | None = Field(None, description="Folder for log.jsonl, checkpoints, tokenizer, TensorBoard.")
    tensorboard: bool = Field(False, description="Write TensorBoard events through DeepSpeed's monitor.")
    zero_init: bool = Field(False, description="Stage 3: partition the weights while they are made.")
    time_limit_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Save and end, with status 75, after this many seconds of training.",
    )
    hang_timeout: float = Field(
        600.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without progress after which a rank is named and all end; 0: never. [600]",
    )
    max_skips: int = Field(
        50,
        ge=0,
        description="Stop after so many steps in a row without finite numbers; 0: never. [50]",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="What else the DeepSpeed JSON (`--config`) says, as it is.",
    )

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
