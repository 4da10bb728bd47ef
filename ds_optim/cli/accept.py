"""The command ``ds-optim accept``: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def accept(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.jsonl and the page. [runs/accept, or the next runs/accept-N]"),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Parts, comma-separated: kernels,optimizers,memory,step,polar,elementwise,wire. [all]"),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes that train. [a GPU each; 2 where there is none]")] = None,
    minutes: Annotated[float, typer.Option(help="What all parts may take; a part that takes its share is ended.")] = 15,
    quick: Annotated[bool, typer.Option("--quick", help="A few cells of each part, to see that it runs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier page in --out.")] = False,
) -> int:
    """Accept this machine: kernels, optimizers under ZeRO, memory and speed, checked and written on one page.

    Exits with 0 if every check holds, 1 if one does not, 2 for a mistake in the command. A part that fails or hangs
    costs the others nothing. On a machine with GPUs it takes them all; DS_ACCELERATOR=cpu leaves them out.
    """
    from ds_optim.accept.checks import AcceptSettings
    from ds_optim.accept.parts import PARTS
    from ds_optim.accept.run import accept as run
    from ds_optim.bench import arguments
    from ds_optim.machine.forked import check_ranks, usable_gpus
    from ds_optim.sweep import options

    arguments.at_least("--minutes", minutes, 0.01)
    chosen = list(PARTS) if only is None else arguments.names("--only", only, list(PARTS))
    gpus = usable_gpus()
    ranks = (gpus or 2) if ranks is None else ranks
    check_ranks(ranks)
    settings = AcceptSettings(gpus=gpus, ranks=ranks, quick=quick)
    place = options.folder(out, Path("runs/accept"), force=force)
    return run(settings, [name for name in PARTS if name in chosen], place, minutes=minutes, force=force)
