"""The commands ``ds-optim memory`` and ``ds-optim report``: their flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ds_optim.errors import UserError


def memory(
    optimizers: Annotated[
        str, typer.Option(help="Names, comma-separated; deepspeed:Muon is DeepSpeed's own.")
    ] = "adamw,lion,muon,lion_muon",
    stages: Annotated[str, typer.Option(help="ZeRO stages, comma-separated.")] = "1,2,3",
    momentum_dtypes: Annotated[
        str, typer.Option(help="float32, bfloat16, int8, comma-separated; of optimizers with one buffer.")
    ] = "float32",
    ranks: Annotated[int, typer.Option(help="Processes a cell.")] = 2,
    repeat: Annotated[int, typer.Option(help="Fresh process groups a cell.")] = 3,
    steady: Annotated[int, typer.Option(help="Steps of each, from the third on, whose peak is taken.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, results.csv and the report.")] = Path(
        "runs/memory"
    ),
    preset: Annotated[str | None, typer.Option(help="The model, as in train.")] = None,
    data: Annotated[str | None, typer.Option(help="The text, as in train.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="As in train.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences a rank takes at once.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same for every cell.")] = None,
    optimizer_params: Annotated[
        str | None, typer.Option(help='By optimizer, as JSON: \'{"lion": {"lr": 0.001}}\'.')
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(help="What else the DeepSpeed JSON of every cell says, as JSON.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a cell may take.")] = None,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Keep the CUDA allocator's history of each rank in its cell's folder.")
    ] = False,
) -> int:
    """Measure what optimizers hold at each ZeRO stage, beside the count by owner and the estimate, against AdamW."""
    given: dict[str, Any] = {name: value for name, value in locals().items() if value is not None}
    from pydantic import ValidationError

    from ds_optim.train.memory import MemorySettings, run_memory
    from ds_optim.train.settings import one_line, parse_object, split_list

    for name in ("optimizers", "stages", "momentum_dtypes"):
        given[name] = split_list(given[name])
    for name in ("optimizer_params", "deepspeed"):
        if name in given:
            given[name] = parse_object(given[name], f"--{name.replace('_', '-')}")
    try:
        settings = MemorySettings(**given)
    except ValidationError as error:
        raise UserError(one_line(error, MemorySettings.model_fields)) from None
    return run_memory(settings)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, of one command: compare or memory.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged results and the report.")] = Path("runs/report"),
) -> int:
    """Make one report of the results of several runs, nodes or machines."""
    from ds_optim.report.merge import merge_runs

    made = merge_runs(folders, out)
    for path in (made.markdown, made.html):
        typer.echo(str(path))
    return 0
