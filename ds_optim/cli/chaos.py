"""The command ``ds-optim chaos``: its flags, and the table that it prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ds_optim.errors import UserError


def chaos(
    kills: Annotated[int, typer.Option(min=1, help="Random faults in all.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the faults: where, when and which.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs side by side, of two ranks each.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the runs live meanwhile. [the system's]")] = None,
) -> int:
    """Kill small runs at random points and damage their files; exit 1 if anything promised was lost.

    Takes some minutes on two cores; a tenth of the faults comes to runs under the launchers of this machine. What is
    promised: no run loses more than the steps since its last complete checkpoint, none goes on from a part of one, and
    none hangs.
    """
    from ds_optim.chaos.run import ChaosSettings, run_chaos, table_of

    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--folder {str(folder)!r} is no folder that can be written to: make it first")
    settings = ChaosSettings(kills=kills, seed=seed, runs=min(runs, kills), folder=folder)
    outcomes = run_chaos(settings, lambda line: print(line, file=sys.stderr, flush=True))
    print_rows(f"{kills} random kill points, seed {seed}", table_of(outcomes))
    return int(any(outcome.wrong is not None for outcome in outcomes))


def print_rows(title: str, rows: list[dict[str, str]]) -> None:
    """Rows of equal keys on stdout, as a Markdown table that is also aligned."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *rows]
    print(f"{title}\n")
    for line in lines:
        print("| " + " | ".join(line[name].ljust(width) for name, width in widths.items()) + " |")
