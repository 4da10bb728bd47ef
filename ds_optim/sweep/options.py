"""The flags that ``ds-optim compare`` and ``memory`` share, and settings made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ds_optim.errors import UserError
from ds_optim.machine.kept_results import RESULTS, RUN_FILE, free_folder, newest_folder

#: Of a list of names.
Optimizers = Annotated[str, typer.Option(help="Names, comma-separated; deepspeed:Muon is DeepSpeed's own.")]
Stages = Annotated[str, typer.Option(help="ZeRO stages, comma-separated.")]
MomentumDtypes = Annotated[
    str, typer.Option(help="float32, bfloat16, int8, comma-separated; of optimizers with one buffer.")
]
Ranks = Annotated[int, typer.Option(help="Processes a cell.")]
Preset = Annotated[str | None, typer.Option(help="The model, as in train.")]
Data = Annotated[str | None, typer.Option(help="The text, as in train.")]
Tokenizer = Annotated[str | None, typer.Option(help="As in train.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence.")]
MicroBatch = Annotated[int | None, typer.Option(help="Sequences a rank takes at once.")]
Accumulation = Annotated[int | None, typer.Option(help="Micro-batches a step.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp32 or fp16.")]
Seed = Annotated[int | None, typer.Option(help="The same for every cell.")]
OptimizerParams = Annotated[str | None, typer.Option(help='By optimizer, as JSON: \'{"lion": {"lr": 0.001}}\'.')]
DeepSpeedJson = Annotated[
    str | None,
    typer.Option("--deepspeed", help="What else the DeepSpeed JSON of every cell says, as JSON."),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a cell may take.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the cells of --out that ran, and run the others.")]
Force = Annotated[bool, typer.Option("--force", help="Replace earlier results in --out.")]

#: A folder with one of these has results.
HELD = (RESULTS, RUN_FILE)
_LISTS = ("optimizers", "stages", "momentum_dtypes")
_OBJECTS = ("optimizer_params", "deepspeed")
Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """A ``CompareSettings`` or ``MemorySettings`` of the flags that were given.

    Raises:
        UserError: one line for the first mistake.
    """
    from pydantic import ValidationError

    from ds_optim.job.settings import parse_object, split_list
    from ds_optim.zero.complaints import reword

    given = {name: value for name, value in flags.items() if value is not None}
    for name in given.keys() & _LISTS:
        given[name] = split_list(given[name])
    for name in given.keys() & _OBJECTS:
        given[name] = parse_object(given[name], f"--{name.replace('_', '-')}")
    if "deepspeed" in given:
        from ds_optim.zero.values import understood

        given["deepspeed"] = understood(given["deepspeed"])
    try:
        return kind(**given)
    except ValidationError as error:
        raise UserError(reword(error, kind)) from None  # type: ignore[arg-type]


def folder(given: Path | None, default: Path, *, resume: bool = False, force: bool = False) -> Path:
    """Where results go: what was given; else the default, or beside it where that has results that are to stay."""
    if given is not None:
        return given
    chosen = newest_folder(default, HELD) if resume or force else free_folder(default, HELD)
    if chosen != default:
        typer.echo(f"results of before stay in {default}: these are in {chosen}", err=True)
    return chosen
