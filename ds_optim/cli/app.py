"""The command line as a whole: its commands, and how a command that fails ends.

Commands import what they need when they run: no ``--help`` needs torch. A user's mistake is one line on
stderr and exit status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ds_optim.cli.accept import accept
from ds_optim.cli.bench import app as bench_app
from ds_optim.cli.chaos import chaos
from ds_optim.cli.compare import compare
from ds_optim.cli.convert_config import convert_config
from ds_optim.cli.doctor import doctor
from ds_optim.cli.estimate import estimate
from ds_optim.cli.failing import fail, limit_met
from ds_optim.cli.hostfile import hostfile
from ds_optim.cli.memory import memory, report
from ds_optim.cli.reshard import reshard
from ds_optim.cli.routes import routes
from ds_optim.cli.simulate import simulate
from ds_optim.cli.suggest import suggest
from ds_optim.cli.train import train
from ds_optim.errors import UserError
from ds_optim.job.exits import RunStopped
from ds_optim.machine.held import release
from ds_optim.machine.plugins import PLUGINS, load_plugins
from ds_optim.zero.versions import EXTRA_OF, check_extra, missing

NEEDS = {"train": ("train",), "compare": ("train", "report"), "memory": ("train", "report")}
NEEDS |= {"chaos": ("train",), "report": ("report",), "accept": ("train", "report")}
"""By command the extras without which it could not end well, looked at before it begins."""
INTERRUPTED = 130
"""What shells say of a command that Ctrl-C ended."""

app = typer.Typer(
    name="ds-optim",
    help="One-momentum, matrix-aware optimizers for DeepSpeed ZeRO.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
COMMANDS = (
    train,
    compare,
    memory,
    report,
    estimate,
    suggest,
    routes,
    simulate,
    convert_config,
    reshard,
    chaos,
    doctor,
    accept,
    hostfile,
)
for command in COMMANDS:
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
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A Python file or module that registers an optimizer (ds_optim.register); anywhere in the line, any "
            f"number of times. {PLUGINS} in the environment does the same.",
        ),
    ] = None,
) -> None:
    pass  # --plugin is taken out before, so that it may stand anywhere


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 2 for a user's mistake, or one that a command documents."""
    _prefer_own_scripts()
    arguments, plugins = take_plugins(take_local_rank(list(sys.argv[1:] if argv is None else argv)))
    if arguments[:1] != ["train"]:
        release()
    command = typer.main.get_command(app)
    try:
        if "--help" not in arguments:
            load_plugins(plugins)
            for extra in NEEDS.get(next(iter(arguments), ""), ()):
                check_extra(extra, f"ds-optim {arguments[0]}")
        status = command.main(args=arguments, prog_name="ds-optim", standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except RunStopped as error:
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        fail(missing(error.name, EXTRA_OF[error.name], "this command"))
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


def take_plugins(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without ``--plugin FILE``, wherever it stands, and the files."""
    kept: list[str] = []
    plugins: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--plugin":
            kept.append(argument)
            continue
        given = value if equals else next(rest, "")
        if not given:
            fail("--plugin names no file: write --plugin my_rule.py")
        plugins.append(given)
    return kept, plugins


@app.command()
def version() -> None:
    """Print the versions of ds-optim and of what it runs on."""
    for package in ("ds-optim", "torch", "deepspeed", "transformers", "datasets"):
        typer.echo(f"{package} {_installed(package)}")
