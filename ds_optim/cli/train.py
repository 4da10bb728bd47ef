"""The command ``ds-optim train``: its flags, and what it prints at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.cli.failing import fail
from ds_optim.cli.flags import with_flags
from ds_optim.errors import UserError
from ds_optim.job.settings import WITHOUT_FLAG, TrainSettings, make_settings, parse_object

if TYPE_CHECKING:
    from ds_optim.job.recipes import Recipe
    from ds_optim.survival.preemption import Preemption

_Recipe = Annotated[
    str | None, typer.Option(help="A published run: a name in configs/recipes, or a path; flags win over it.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print tokens, memory and hours of the run, and end.")]
_Rate = Annotated[float | None, typer.Option(help="With --dry-run: tokens a second of all ranks, for the hours.")]


@with_flags(TrainSettings, without=WITHOUT_FLAG)
def train(
    config: Annotated[Path | None, typer.Option(help="A DeepSpeed JSON; flags win over it.")] = None,
    recipe: _Recipe = None,
    dry_run: _DryRun = False,
    tokens_per_s: _Rate = None,
    **flags: Any,
) -> int:
    """Pretrain a causal language model under DeepSpeed ZeRO.

    One process: python -m ds_optim train --steps 40. Two ranks: deepspeed --num_accelerators 2 --module
    ds_optim train --stage 3.

    Exit status: 0 done; 2 a mistake in the flags; 75 stopped by Ctrl-C, SIGTERM, SIGUSR1, a file OUT/stop or
    --time-limit-s, saved: start again with --resume;
    69 a rank died or hung: the same; 74 the last checkpoint could not be written; 65 no finite numbers (--max-skips).
    """
    from ds_optim.job.recipes import load_recipe
    from ds_optim.machine import ranks
    from ds_optim.machine.meeting import launched
    from ds_optim.survival.preemption import Preemption

    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    published = None if recipe is None else load_recipe(recipe)
    if dry_run:
        from ds_optim.cli.dry_run import print_plan

        count = ranks.expected() if launched() or published is None else published.ranks
        return print_plan(train_settings(given, config, published, count), count, published, tokens_per_s)
    if tokens_per_s is not None:
        raise UserError("--tokens-per-s is for --dry-run: add it, or leave the rate out")
    with Preemption(given.get("out"), last=True) as preemption:
        return run_train(train_settings(given, config, published, ranks.expected()), preemption)


def train_settings(
    flags: dict[str, Any], config: Path | None, recipe: Recipe | None = None, count: int = 1
) -> TrainSettings:
    """Validated settings of the flags that were given, and of a DeepSpeed JSON or a recipe on ``count`` ranks under
    them."""
    from ds_optim.job.deepspeed_json import settings_from_json
    from ds_optim.zero.reading import load_config

    given = dict(flags)
    if "optimizer_params" in given:
        given["optimizer_params"] = parse_object(given["optimizer_params"], "--optimizer-params")
    if config is not None and recipe is not None:
        raise UserError("give --recipe or --config, one of the two: both say how to train")
    if recipe is not None:
        given = recipe.settings_for(given, count)
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
