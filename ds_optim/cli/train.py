"""The command ``ds-optim train``: its flags, and what it prints at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.cli.failing import fail
from ds_optim.survival.preemption import Preemption

if TYPE_CHECKING:
    from ds_optim.job.settings import TrainSettings


def train(
    preset: Annotated[str | None, typer.Option(help="qwen3-tiny (default) or qwen3-134m.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="In place of a preset: a folder, config.json or hub name of a causal LM."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="shakespeare (shipped, default); a file, folder or glob of text, JSON, CSV, parquet or arrow,"
            " plain or as gz, xz, bz2, zst; or hub:REPO[:CONFIG[:SPLIT]]."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, bpe:N (trained on the data), or hf:DIRECTORY.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences a rank takes at once.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Updates; the cosine ends at 0 there. More with --resume extend a run. [100]")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warmup. [a tenth]")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="lion_muon (default), lion, muon, adamw, deepspeed:Muon, ...")
    ] = None,
    optimizer_params: Annotated[
        str | None, typer.Option(help='Its parameters as JSON: \'{"lr": 0.001, "period": 2}\'.')
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, over the preset's tuned one.")] = None,
    stage: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3. [1]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (default), fp32 or fp16.")] = None,
    clip: Annotated[float | None, typer.Option(help="Gradient norm to clip at; 0 is off. [1.0]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout. [0]")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations; 0: at the end alone. [0]")] = None,
    eval_batches: Annotated[int | None, typer.Option(help="Global batches a validation. [8]")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints, and one at the end; 0: none. [0]")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Newest checkpoints to keep; 0: all of them. [0]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in --out.")
    ] = False,
    reset_optimizer: Annotated[
        bool,
        typer.Option(
            "--reset-optimizer", help="With --resume: keep weights, schedule and place in the text; any --optimizer."
        ),
    ] = False,
    accept: Annotated[
        str | None,
        typer.Option(help="With --resume: go on though these changed: of text, model, tokenizer, polar."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew where --out holds the log of an earlier run, and replace it.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for log.jsonl, checkpoints, tokenizer, TensorBoard.")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events through DeepSpeed's monitor.")
    ] = False,
    zero_init: Annotated[
        bool, typer.Option("--zero-init", help="Stage 3: partition the weights while they are made.")
    ] = False,
    time_limit_s: Annotated[
        float | None, typer.Option(help="Save and end, with status 75, after this many seconds of training.")
    ] = None,
    hang_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds without progress after which a rank is named and all end; 0: never. [600]"),
    ] = None,
    max_skips: Annotated[
        int | None, typer.Option(help="Stop after so many steps in a row without finite numbers; 0: never. [50]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A DeepSpeed JSON; flags win over it.")] = None,
) -> int:
    """Pretrain a causal language model under DeepSpeed ZeRO.

    One process: python -m ds_optim train --steps 40. Two ranks: deepspeed --num_accelerators 2 --module
    ds_optim train --stage 3.

    Exit status: 0 done; 2 a mistake in the flags; 75 stopped by Ctrl-C, SIGTERM, SIGUSR1, a file OUT/stop or
    --time-limit-s, saved: start again with --resume;
    69 a rank died or hung: the same; 74 the last checkpoint could not be written; 65 no finite numbers (--max-skips).
    """
    flags = {
        name: value for name, value in locals().items() if value is not None and value is not False and name != "config"
    }
    with Preemption(out, last=True) as preemption:
        return run_train(train_settings(flags, config), preemption)


def train_settings(flags: dict[str, Any], config: Path | None) -> TrainSettings:
    """Validated settings of the flags that were given and of a DeepSpeed JSON under them."""
    from ds_optim.job.deepspeed_json import settings_from_json
    from ds_optim.job.settings import make_settings, parse_object
    from ds_optim.zero.reading import load_config

    given = dict(flags)
    if "optimizer_params" in given:
        given["optimizer_params"] = parse_object(given["optimizer_params"], "--optimizer-params")
    if config is not None:
        given = settings_from_json(load_config(config), given)
    return make_settings(**given)


def run_train(settings: TrainSettings, preemption: Preemption | None = None) -> int:
    """Train, print the outcome on rank 0, and return the status to exit with."""
    from ds_optim.job import exits
    from ds_optim.machine import ranks
    from ds_optim.survival.watchdog import end_process
    from ds_optim.train.loop import train as train_model

    quiet_deepspeed()
    try:
        result = train_model(settings, preemption=preemption)
        if ranks.rank() == 0 and result.status != exits.PREEMPTED:
            print_result(result, settings)
        if result.status == exits.PREEMPTED:
            ranks.end_at_once(result.status)
        ranks.end_together(result.status)
    except exits.RankLost as error:
        end_process(str(error), error.status)
    except exits.Preempted as error:
        if ranks.rank() == 0:
            print(f"ds-optim: {error}", file=sys.stderr)
        ranks.end_at_once(error.status)
        return error.status
    except exits.RunStopped as error:
        fail(str(error), error.status)
    finally:
        ranks.leave()
    return result.status


def print_result(result: Any, settings: TrainSettings) -> None:
    """The outcome of a run as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{settings.optimizer}, stage {settings.stage}, {settings.dtype}", show_header=False)
    nothing = "no step was left to do"
    rows = {
        "validation loss (nats/token)": f"{result.val_loss:.4f}",
        "unigram entropy of the text": f"{result.unigram_entropy:.4f}",
        "ratio": f"{result.entropy_ratio:.3f}",
        "steps": f"{result.steps:,} ({result.skipped_steps} skipped)",
        "ms per step (median)": f"{result.ms_per_step:.1f}" if result.losses else nothing,
        "tokens/s": f"{result.tokens_per_s:,.0f}" if result.losses else nothing,
        "parameters": f"{result.parameters:,}",
        "peak memory of rank 0": f"{result.peak_memory_bytes / 2**20:,.0f} MiB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    if settings.out is not None:
        print(f"log: {settings.out / 'log.jsonl'}")


def quiet_deepspeed() -> None:
    """Silence notices that are dozens of lines a rank; DeepSpeed's warnings stay."""
    import logging
    import warnings

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Torch tells DeepSpeed, on every rank, that names of its collectives will change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
