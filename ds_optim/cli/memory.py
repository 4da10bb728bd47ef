"""The commands ``ds-optim memory`` and ``ds-optim report``: their flags."""

from pathlib import Path
from typing import Annotated

import typer

from ds_optim.sweep import options


def memory(
    optimizers: options.Optimizers = "adamw,lion,muon,lion_muon",
    stages: options.Stages = "1,2,3",
    momentum_dtypes: options.MomentumDtypes = "float32",
    ranks: options.Ranks = 2,
    repeat: Annotated[int, typer.Option(help="Fresh process groups a cell.")] = 3,
    steady: Annotated[int, typer.Option(help="Steps of each, from the third on, whose peak is taken.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results and the report. [runs/memory, or the next runs/memory-N]"),
    ] = None,
    preset: options.Preset = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    seq_len: options.SeqLen = None,
    micro_batch: options.MicroBatch = None,
    accumulation: options.Accumulation = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    optimizer_params: options.OptimizerParams = None,
    deepspeed: options.DeepSpeedJson = None,
    timeout: options.Timeout = None,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Keep the CUDA allocator's history of each rank in its cell's folder.")
    ] = False,
    resume: options.Resume = False,
    force: options.Force = False,
) -> int:
    """Measure what optimizers hold at each ZeRO stage, beside the count by owner and the estimate, against AdamW."""
    given = dict(locals())
    given["out"] = options.folder(out, Path("runs/memory"), resume=resume, force=force)
    from ds_optim.sweep.memory import MemorySettings, run_memory

    return run_memory(options.settings_of(MemorySettings, given))


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, of one command: compare or memory.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the merged results and the report. [runs/report, or the next runs/report-N]"),
    ] = None,
    force: options.Force = False,
) -> int:
    """Make one report of the results of several runs, nodes or machines."""
    from ds_optim.machine.kept_results import refuse
    from ds_optim.report.merge import merge_runs

    place = options.folder(out, Path("runs/report"), force=force)
    if not force:
        refuse(place, options.HELD, "add --force to replace it, or give another --out")
    made = merge_runs(folders, place)
    for path in (made.markdown, made.html):
        typer.echo(str(path))
    return 0
