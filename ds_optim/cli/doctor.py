"""The command ``ds-optim doctor``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.cluster.doctor import Examination

_MOST_S = 86_400.0


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Your DeepSpeed JSON, for two steps as ds_optim.initialize reads it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs will write: the disk that is looked at.")] = Path("runs"),
    timeout: Annotated[float, typer.Option(help="Seconds that ranks wait for each other.")] = 60.0,
    trial: Annotated[bool, typer.Option(help="Take two steps with a tiny model.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one line of JSON.")] = False,
) -> int:
    """Check this machine, or under a launcher every node: each line is fine, or says what to do.

    Exits with 0 if all is fine, 1 if there is something to do, 2 for a mistake in the command. Over nodes:
    bash launch/hostfile.sh --hostfile FILE doctor --config ds.json. Whether kernels, optimizers and memory are right on
    a machine's devices is what ds-optim accept finds out.
    """
    if not 0 < timeout <= _MOST_S:
        raise UserError(f"--timeout is {timeout:g}: write seconds, more than 0 and up to {_MOST_S:g}")
    if config is not None and config.is_dir():
        raise UserError(f"--config {str(config)!r} is a folder: name the JSON in it")
    # Over nodes, that a file is missing on one of them is a finding.
    if config is not None and not config.exists() and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(f"cannot read the config {str(config)!r}: no such file")
    from ds_optim.cluster.doctor import DoctorSettings, examine, ranks_variable

    with _stdout_for_findings():
        found = examine(DoctorSettings(config=config, out=out, timeout_s=timeout, trial=trial))
    # A rank that could not join tells by itself.
    if not found.facts or ranks_variable() == "0":
        typer.echo(json.dumps(found.to_json()) if as_json else _text(found))
    _leave(found.status)
    return found.status


@contextmanager
def _stdout_for_findings() -> Iterator[None]:
    """Send to stderr what DeepSpeed and its builds print on stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _text(found: Examination) -> str:
    width = max(len(finding.check) for finding in found.findings)
    lines = [f"{'ok  ' if f.fine else 'TODO'}  {f.check:<{width}}  {f.line}" for f in found.findings]
    open_points = sum(not f.fine for f in found.findings)
    end = "all fine" if not open_points else f"{open_points} to do"
    if any("GPU" in fact["versions"] for fact in found.facts):
        lines.append("      ds-optim accept --out DIR checks kernels, optimizers and memory on a machine's GPUs")
    return "\n".join([*lines, f"{found.ranks} rank(s) on {', '.join(found.nodes)}: {end}"])


def _leave(status: int) -> None:
    """Leave the process group; after a failure not in order, which would wait for ranks that are gone."""
    from ds_optim.machine import ranks

    if status != 0:
        ranks.end_at_once(status)
        ranks.leave()
    else:
        ranks.end_together()
