"""What ``ds-optim compare`` runs: its settings, and the cells that they make."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError, did_you_mean
from ds_optim.job.deepspeed_json import section_of
from ds_optim.job.presets import PRESETS
from ds_optim.job.settings import TrainSettings, make_settings
from ds_optim.machine.plugins import plugins
from ds_optim.memory.estimate_optimizers import takes_momentum_dtype
from ds_optim.zero.config import DEEPSPEED_PREFIX, check_type

#: Steps left out of the timing: kernels warm up, optimizer state is made, and memory is counted.
UNTIMED_STEPS = 3
#: What momentum is kept in where nothing else is asked for.
FP32 = "float32"


class CompareSettings(BaseModel):
    """One comparison: each optimizer at each stage, all else equal. None leaves a setting to the preset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizers: list[str] = Field(min_length=1)
    stages: list[int] = Field(min_length=1)
    ranks: int = Field(2, ge=1)
    steps: int = Field(40, gt=UNTIMED_STEPS)
    out: Path
    preset: str = "qwen3-tiny"
    data: str | None = None
    tokenizer: str | None = None
    seq_len: int | None = None
    micro_batch: int | None = None
    accumulation: int = Field(1, ge=1)
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = Field(0, ge=0, lt=2**63)
    eval_batches: int | None = None
    optimizer_params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    timeout: float = Field(900.0, gt=0, description="seconds that a cell may take")
    repeat: int = Field(1, ge=1)
    momentum_dtypes: list[str] = Field(default_factory=lambda: [FP32], min_length=1)
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="what else the DeepSpeed JSON of a cell says")
    resume: bool = Field(False, description="keep the cells in out that ran, and run the others")
    force: bool = Field(False, description="replace results of before in out")

    @field_validator("optimizers", "stages", "momentum_dtypes")
    @classmethod
    def _once_each(cls, given: list[Any]) -> list[Any]:
        return list(dict.fromkeys(given))

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, given: list[int]) -> list[int]:
        for stage in given:
            if stage not in (0, 1, 2, 3):
                raise ValueError(f"there is no ZeRO stage {stage}; write 0, 1, 2 or 3")
        return given

    @field_validator("momentum_dtypes")
    @classmethod
    def _known_dtypes(cls, given: list[str]) -> list[str]:
        for dtype in given:
            if dtype not in DTYPES:
                raise ValueError(
                    f"unknown momentum dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; write {', '.join(DTYPES)}"
                )
        return given


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: ``train`` says all of it but the ranks; ``notes`` say where it differs from the other cells."""

    optimizer: str
    momentum_dtype: str
    stage: int
    repeat: int
    folder: Path
    train: TrainSettings
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """The optimizer, with its momentum's dtype where that is not fp32."""
        return self.optimizer if self.momentum_dtype == FP32 else f"{self.optimizer}, {self.momentum_dtype}"


def plan_cells(settings: CompareSettings) -> list[Cell]:
    """The cells in the order in which they run: optimizers of one stage next to each other, repeats apart.

    Raises ``UserError`` for an optimizer that is not known and for settings that no run can have.
    """
    make_settings(preset=settings.preset)  # an unknown preset is told before anything is read from it
    check_optimizers(settings)
    return [
        _cell(settings, optimizer, dtype, stage, repeat)
        for repeat in range(settings.repeat)
        for stage in settings.stages
        for optimizer in settings.optimizers
        for dtype in momentum_dtypes(optimizer, settings.momentum_dtypes)
    ]


def momentum_dtypes(optimizer: str, asked: Sequence[str]) -> Sequence[str]:
    """Those of the asked for that the optimizer has: one that keeps two buffers, or is not ours, has its own alone."""
    return asked if takes_momentum_dtype(optimizer) else (FP32,)


def check_optimizers(settings: CompareSettings) -> None:
    """Raise ``UserError`` for a name that neither this package, DeepSpeed nor torch has."""
    for name in settings.optimizers:
        check_type(name)
    for name in settings.optimizer_params:
        if name not in settings.optimizers:
            raise UserError(
                f"optimizer_params names {name!r}, which is not compared"
                f"{did_you_mean(name, settings.optimizers)}; the optimizers are {', '.join(settings.optimizers)}"
            )


def reproduce(settings: CompareSettings, command: str = "compare") -> str:
    """The command line that runs this sweep again; settings left at their defaults are left out."""
    words = ["ds-optim", command, *chain(*(("--plugin", name) for name in plugins()))]
    words += ["--optimizers", ",".join(settings.optimizers)]
    words += ["--stages", ",".join(map(str, settings.stages)), "--ranks", str(settings.ranks)]
    words += ["--steps", str(settings.steps)] if command == "compare" else []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in ("optimizers", "stages", "ranks", "steps", "out", "resume", "force") or value == field.get_default(
            call_default_factory=True
        ):
            continue
        if value is True:
            words.append(f"--{name}")
            continue
        words += [f"--{name.replace('_', '-')}", _flag(value)]
    return shlex.join([*words, "--out", settings.out.name])


def _cell(settings: CompareSettings, optimizer: str, dtype: str, stage: int, repeat: int) -> Cell:
    name = cell_name(optimizer, dtype, stage, repeat)
    params = dict(settings.optimizer_params.get(optimizer, {}))
    if dtype != FP32:
        params["momentum_dtype"] = dtype
    folder = settings.out / "logs" / name
    given: dict[str, Any] = {
        "preset": settings.preset,
        "accumulation": settings.accumulation,
        "steps": settings.steps,
        "optimizer": optimizer,
        "optimizer_params": params,
        "stage": stage,
        "dtype": settings.dtype,
        "seed": settings.seed + repeat,
        "out": folder,
    }
    for optional in ("data", "tokenizer", "seq_len", "micro_batch", "eval_batches"):
        if getattr(settings, optional) is not None:
            given[optional] = getattr(settings, optional)
    zero = {**bucket_settings(settings.preset), **section_of(settings.deepspeed, "zero_optimization")}
    given["deepspeed"] = {**settings.deepspeed, "zero_optimization": zero}
    notes = []
    if optimizer.lower() == DEEPSPEED_PREFIX + "muon":
        notes.append("DeepSpeed's Muon clips the orthogonalized update, not the gradient; clipping is left as it is.")
        if settings.dtype != "fp32":
            notes.append(f"DeepSpeed's Muon keeps its momentum in {settings.dtype}, not in fp32.")
        if stage == 3:
            zero["reduce_scatter"] = False
            notes.append("reduce_scatter is false in this cell: DeepSpeed's Muon asks for it at stage 3.")
    return Cell(
        optimizer=optimizer,
        momentum_dtype=dtype,
        stage=stage,
        repeat=repeat,
        folder=folder,
        train=make_settings(**given),
        notes=tuple(notes),
    )


def _flag(value: Any) -> str:
    """A setting as its flag takes it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def cell_name(optimizer: str, momentum_dtype: str, stage: int, repeat: int) -> str:
    """The name of a cell's folder."""
    parts = [optimizer.replace(":", "-").lower(), f"stage{stage}"]
    parts += [momentum_dtype] * (momentum_dtype != FP32) + [f"repeat{repeat}"] * (repeat > 0)
    return "-".join(parts)


def bucket_settings(preset: str) -> dict[str, Any]:
    """ZeRO's buckets in elements, an eighth of the model each; at stage 3 only its norms stay gathered.

    DeepSpeed's defaults (500 million elements) would make every cell's peak that of an empty bucket.
    """
    shape = PRESETS[preset].shape
    hidden = shape["hidden_size"]
    matrices = shape["num_hidden_layers"] * hidden * (4 * hidden + 3 * shape["intermediate_size"])
    vocabulary = PRESETS[preset].vocab_size or 256
    bucket = max(2**18, (matrices + 2 * hidden * vocabulary) // 8)
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10 * hidden,
    }
