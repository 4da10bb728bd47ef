"""The command ``ds-optim compare``: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from ds_optim.sweep import options


def compare(
    optimizers: options.Optimizers = "adamw,lion,muon,lion_muon",
    stages: options.Stages = "1,2,3",
    ranks: options.Ranks = 2,
    steps: Annotated[int, typer.Option(help="Updates a cell.")] = 40,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.jsonl and the report. [runs/compare, or the next runs/compare-N]"),
    ] = None,
    preset: options.Preset = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    seq_len: options.SeqLen = None,
    micro_batch: options.MicroBatch = None,
    accumulation: options.Accumulation = None,
    eval_batches: Annotated[int | None, typer.Option(help="Global batches a validation.")] = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    optimizer_params: options.OptimizerParams = None,
    timeout: options.Timeout = None,
    repeat: Annotated[int | None, typer.Option(help="Runs a cell.")] = None,
    momentum_dtypes: options.MomentumDtypes = "float32",
    deepspeed: options.DeepSpeedJson = None,
    resume: options.Resume = False,
    force: options.Force = False,
) -> int:
    """Train every optimizer at every ZeRO stage and compare loss, time and memory in one table."""
    given = dict(locals())
    given["out"] = options.folder(out, Path("runs/compare"), resume=resume, force=force)
    from ds_optim.sweep.compare import CompareSettings, run_compare

    return run_compare(options.settings_of(CompareSettings, given))
