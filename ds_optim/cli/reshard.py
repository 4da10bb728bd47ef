"""The command ``ds-optim reshard``: its flags, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.zero.checkpoints import Portable
    from ds_optim.zero.checkpoints.reshard import Change


def reshard(
    source: Annotated[Path, typer.Argument(help="A checkpoint: a tag's folder, or the folder with `latest`.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the tag's folder and `latest`.")],
    ranks: Annotated[int | None, typer.Option(help="All ranks of the job that is to load it. [as it is]")] = None,
    stage: Annotated[int | None, typer.Option(help="Their ZeRO stage, 0 to 3. [as it is]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Their DeepSpeed JSON, for the stage and what ZeRO cuts by.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Hand the state to another optimizer: lion_muon, lion, muon, signum, ...")
    ] = None,
    optimizer_params: Annotated[
        str | None, typer.Option(help='Its parameters as JSON: \'{"lr": 0.001, "period": 2}\'. [those in --config]')
    ] = None,
    reset_optimizer: Annotated[
        bool, typer.Option("--reset-optimizer", help="Keep weights, schedule and data position; drop optimizer state.")
    ] = False,
) -> int:
    """Cut a DeepSpeed checkpoint anew for other ranks and another ZeRO stage: one process, no GPU.

    ds-optim reshard out/checkpoints resharded --ranks 4 --stage 3
    """
    from ds_optim.survival.reshard_seal import seal_like, sealed_notes
    from ds_optim.zero.checkpoints.module import of_one_rank
    from ds_optim.zero.checkpoints.reshard import reshard as run

    loaded = _config(config)
    change = _change(optimizer, optimizer_params, loaded, reset=reset_optimizer)
    notes = sealed_notes(source)
    done = run(
        source,
        target,
        ranks=ranks,
        stage=stage,
        config=loaded,
        change=change,
        seal=seal_like(notes, handed_over=optimizer is not None),
        state=not reset_optimizer,
    )
    before = done.source.ranks * done.source.column.tensor_ranks
    typer.echo(f"found:   {summary(done.source, done.source.stage, before)}")
    typer.echo(f"written: {summary(done.written, done.target.stage, done.target.processes)}")
    alone = of_one_rank(done.source, done.target.stage, done.target.ranks)
    if alone:
        typer.echo(f"of the first rank alone, where each had its own: {', '.join(alone)}")
    typer.echo(f"verified: {_verified(done.written)}")
    typer.echo(f"{done.folder}")
    return 0


def summary(portable: Portable, stage: int, ranks: int) -> str:
    """One line on a checkpoint: optimizer, stage, ranks, parameters of each rank, dtypes, step."""
    specs = portable.specs
    weights = {str(portable.weights_dtype(spec.name)).removeprefix("torch.") for spec in specs}
    count = sum(spec.numel for spec in specs)
    return (
        f"{portable.optimizer}, stage {stage}, {ranks} rank{'s' if ranks > 1 else ''}, "
        f"{_columns(portable)}{count:,} parameters in {len(specs)} tensors, weights {'/'.join(sorted(weights))}, "
        f"momentum {_momentum(portable)}, step {portable.step}"
    )


def _columns(portable: Portable) -> str:
    column = portable.column
    if column.count == 1:
        return ""
    return f"on each of {column.count} {'with experts of their own' if column.experts else 'with shards'} "


def _momentum(portable: Portable) -> str:
    from ds_optim.optimizers.rules import MOMENTUM
    from ds_optim.zero.checkpoints.pieces import dtype_of

    if not portable.has_state:
        return "none"
    named = [spec.name for spec in portable.specs if MOMENTUM in portable.buffers[spec.name]]
    dtypes = {str(dtype_of(portable, name, MOMENTUM)).removeprefix("torch.") for name in named}
    return "/".join(sorted(dtypes)) or "none"


def _verified(portable: Portable) -> str:
    inexact = "int8" in _momentum(portable)
    state = "momentum within a step of its quantization" if inexact else "state bit for bit"
    return f"weights bit for bit, {state if portable.has_state else 'no optimizer state'}, all that a load asks for"


def _config(path: Path | None) -> dict[str, Any] | None:
    from ds_optim.zero.reading import load_config
    from ds_optim.zero.values import understood

    return None if path is None else understood(load_config(path))


def _change(name: str | None, params: str | None, config: dict[str, Any] | None, *, reset: bool) -> Change | None:
    from ds_optim.job.settings import parse_object
    from ds_optim.zero.checkpoints.convert import change_optimizer
    from ds_optim.zero.config import canonical_type

    if name is None:
        if params is not None:
            raise UserError("--optimizer-params goes with --optimizer: name the optimizer")
        return None
    given = {} if params is None else parse_object(params, "--optimizer-params")
    section = (config or {}).get("optimizer")
    if (
        params is None
        and isinstance(section, dict)
        and canonical_type(str(section.get("type"))) == canonical_type(name)
    ):
        given = dict(section.get("params", {}))
    return lambda portable: change_optimizer(portable, name, given, reset=reset)
