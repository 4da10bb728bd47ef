"""The command ``ds-optim compare``: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ds_optim.errors import UserError


def compare(
    optimizers: Annotated[
        str, typer.Option(help="Names, comma-separated; deepspeed:Muon is DeepSpeed's own.")
    ] = "adamw,lion,muon,lion_muon",
    stages: Annotated[str, typer.Option(help="ZeRO stages, comma-separated.")] = "1,2,3",
    ranks: Annotated[int, typer.Option(help="Processes a cell.")] = 2,
    steps: Annotated[int, typer.Option(help="Updates a cell.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and the report.")] = Path("runs/compare"),
    preset: Annotated[str | None, typer.Option(help="The model, as in train.")] = None,
    data: Annotated[str | None, typer.Option(help="The text, as in train.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="As in train.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences a rank takes at once.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    eval_batches: Annotated[int | None, typer.Option(help="Global batches a validation.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same for every cell.")] = None,
    optimizer_params: Annotated[
        str | None, typer.Option(help='By optimizer, as JSON: \'{"lion": {"lr": 0.001}}\'.')
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a cell may take.")] = None,
    repeat: Annotated[int | None, typer.Option(help="Runs a cell.")] = None,
    momentum_dtypes: Annotated[
        str | None, typer.Option(help="float32, bfloat16, int8, comma-separated; of optimizers with one buffer.")
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(help="What else the DeepSpeed JSON of every cell says, as JSON.")
    ] = None,
) -> int:
    """Train every optimizer at every ZeRO stage and compare loss, time and memory in one table."""
    given: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    from pydantic import ValidationError

    from ds_optim.train.compare import CompareSettings, run_compare
    from ds_optim.train.settings import one_line, parse_object, split_list

    for name in ("optimizers", "stages", "momentum_dtypes"):
        if name in given:
            given[name] = split_list(given[name])
    for name in ("optimizer_params", "deepspeed"):
        if name in given:
            given[name] = parse_object(given[name], f"--{name.replace('_', '-')}")
    try:
        settings = CompareSettings(**given)
    except ValidationError as error:
        raise UserError(one_line(error, CompareSettings.model_fields)) from None
    return int(run_compare(settings))
