"""The command ``ds-optim convert-config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ds_optim.machine.kept_results import write_one


def convert_config(
    file: Annotated[
        Path, typer.Argument(help="A DeepSpeed JSON for AdamW, Adam, Lion, Muon, ..., or for a trainer's.")
    ],
    to: Annotated[str, typer.Option(help="The optimizer that it is to have.")] = "LionMuon",
    out: Annotated[Path | None, typer.Option(help="File to write, in place of stdout.")] = None,
    lr: Annotated[float | None, typer.Option(help="AdamW's learning rate, where the file does not tell it.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay, likewise.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that says something else.")] = False,
) -> int:
    """Write a DeepSpeed JSON anew for one of these optimizers, and say each change with its reason.

    ds-optim convert-config ds_z3_config.json --to LionMuon --out lion_muon.json
    """
    from ds_optim.zero.conversion import convert
    from ds_optim.zero.reading import load_config

    done = convert(load_config(file), to, lr=lr, weight_decay=weight_decay)
    text = json.dumps(done.config, indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_one(out, text, "config", force=force)
    # The JSON alone is what stdout is read for.
    for line in done.changes:
        typer.echo(line, err=out is None)
    if done.left:
        typer.echo(
            f'"auto", which a trainer fills in (without one write values): {", ".join(done.left)}', err=out is None
        )
    return 0
