"""The command line: ``ds-optim train`` and, each in a module of its own, the other commands.

Commands import what they need when they run, so that ``--help`` is quick. A user's mistake is one line on
stderr and exit status 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ds_optim.bench.cli import app as bench_app
from ds_optim.errors import UserError
from ds_optim.train.chaos_cli import chaos
from ds_optim.train.compare_cli import compare
from ds_optim.train.doctor_cli import doctor
from ds_optim.train.estimate_cli import estimate
from ds_optim.train.exits import RunStopped
from ds_optim.train.hostfile_cli import hostfile
from ds_optim.train.memory_cli import memory, report
from ds_optim.train.preemption import Preemption, unblock
from ds_optim.train.reshard_cli import reshard
from ds_optim.train.simulate_cli import simulate

if TYPE_CHECKING:
    from ds_optim.train.settings import TrainSettings

INTERRUPTED = 130
"""What shells say of a command that Ctrl-C ended."""

app = typer.Typer(
    name="ds-optim",
    help="One-momentum, matrix-aware optimizers for DeepSpeed ZeRO.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
for command in (compare, memory, report, estimate, simulate, reshard, chaos, doctor, hostfile):
    app.command()(command)
app.add_typer(bench_app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ds-optim {_installed('ds-optim')}")
        raise typer.Exit


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print ds-optim's version.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 2 for a user's mistake, or one that a command documents."""
    _prefer_own_scripts()
    arguments = take_local_rank(list(sys.argv[1:] if argv is None else argv))
    if arguments[:1] != ["train"]:
        unblock()
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="ds-optim", standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except RunStopped as error:
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        limit = limit_met(error)
        if limit is not None:
            fail(limit, 1)
        # Typer's own complaints (an unknown flag, a missing value) are a base class that it keeps private;
        # they alone format themselves.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if not str(message()).strip():
            sys.exit(2)  # no command was named: its help says what there is
        fail(message())
    sys.exit(status if isinstance(status, int) else 0)


def _prefer_own_scripts() -> None:
    """DeepSpeed takes ninja from PATH; another than last time's would build all its C++ ops anew."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])


def fail(line: str, status: int = 2) -> NoReturn:
    """Print one line on stderr, once for all ranks of a node, and exit, with status 2 for a user's mistake."""
    from ds_optim.train.said import is_first_to_say

    line = " ".join(line.split())
    if is_first_to_say(line):
        print(f"ds-optim: error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def limit_met(error: Exception) -> str | None:
    """What to do where a limit of the shell or the machine stopped this process; None where it was something else."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: raise the limit (ulimit -n) and start again"
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if allocator or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "there is not enough memory for this (ulimit -v limits it too): raise the limit, or run a smaller one"
    return None


def take_local_rank(arguments: list[str]) -> list[str]:
    """Take the ``--local_rank N`` out that the ``deepspeed`` launcher puts before the command."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value or next(rest, "0"))
        else:
            kept.append(argument)
    return kept


@app.command()
def version() -> None:
    """Print the versions of ds-optim and of what it runs on."""
    for package in ("ds-optim", "torch", "deepspeed", "transformers", "datasets"):
        typer.echo(f"{package} {_installed(package)}")


@app.command()
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
    with Preemption() as preemption:
        return run_train(train_settings(flags, config), preemption)


def train_settings(flags: dict[str, Any], config: Path | None) -> TrainSettings:
    """Validated settings of the flags that were given and of a DeepSpeed JSON under them."""
    from ds_optim.train.deepspeed_json import settings_from_json
    from ds_optim.train.settings import make_settings, parse_object
    from ds_optim.zero.reading import load_config

    given = dict(flags)
    if "optimizer_params" in given:
        given["optimizer_params"] = parse_object(given["optimizer_params"], "--optimizer-params")
    if config is not None:
        given = settings_from_json(load_config(config), given)
    return make_settings(**given)


def run_train(settings: TrainSettings, preemption: Preemption | None = None) -> int:
    """Train, print the outcome on rank 0, and return the status to exit with."""
    from ds_optim.train import exits, ranks
    from ds_optim.train.loop import train as train_model
    from ds_optim.train.watchdog import end_process

    quiet_deepspeed()
    try:
        result = train_model(settings, preemption=preemption)
        if ranks.rank() == 0 and result.status != exits.PREEMPTED:
            print_result(result, settings)
        if result.status == exits.PREEMPTED:
            ranks.end_at_once(result.status)
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
