"""The command ``ds-optim hostfile``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ds_optim.errors import UserError
from ds_optim.machine.kept_results import write_one


def hostfile(
    nodes: Annotated[str | None, typer.Argument(help="node1:8,node2:8 or node[1-4]:8; without it, the job's.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write, in place of stdout.")] = None,
    slots: Annotated[int | None, typer.Option(help="Ranks of each node, over what the job says.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Of this Slurm job.")] = False,
    mpi: Annotated[
        bool, typer.Option("--mpi", help="Of this MPI job, or of the host file that a variable names.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that says something else.")] = False,
) -> int:
    """Write a hostfile of a list of nodes, or of the Slurm or MPI job that this runs in.

    ds-optim hostfile node1:8,node2:8 --out hostfile
    """
    from ds_optim.cluster.hostfile import find_hosts, from_list, render

    if (nodes is not None) + slurm + mpi > 1:
        raise UserError("give one of a list of nodes, --slurm and --mpi")
    if slots is not None and slots < 1:
        raise UserError(f"--slots is {slots}: write a whole number from 1")
    if nodes is not None:
        hosts = from_list(nodes, slots)
    else:
        hosts = find_hosts(os.environ, "slurm" if slurm else "mpi" if mpi else None, slots)
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") != "0":
        return 0
    text = render(hosts)
    if out is None:
        typer.echo(text, nl=False)
        return 0
    write_one(out, text, "hostfile", force=force)
    total = sum(host.slots for host in hosts)
    typer.echo(f"{out}: {len(hosts)} nodes, {total} ranks")
    return 0
