"""The command ``ds-optim routes``: what each parameter of a model gets, and what to write to have it otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.optimizers.route_rows import Route


def routes(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset, a transformers config.json or folder, a hub name, or a JSON list of parameters."
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help='A DeepSpeed JSON: routes by its "optimizer": {"params": …}.')
    ] = None,
    optimizer_params: Annotated[
        str | None, typer.Option(help='The optimizer\'s parameters, as JSON: \'{"heads": "auto"}\'.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON.")] = False,
) -> int:
    """What each parameter of a model gets, without training: its rule, its view as matrices, and why.

    ds-optim routes qwen3-134m
    """
    from ds_optim.memory.estimate_sources import load_shape
    from ds_optim.optimizers.route_rows import change_of, rows_of_groups
    from ds_optim.optimizers.routes import warnings_of
    from ds_optim.optimizers.routing import MEMBERS, ROUTING_OPTIONS, param_groups

    shape = load_shape(model, None)
    assert shape.module is not None  # but a count has one
    given = _params(config, optimizer_params)
    groups = param_groups(shape.module, **{key: given[key] for key in ROUTING_OPTIONS if key in given})
    members = [member for group in groups for member in group[MEMBERS]]
    names = [member.spec.name for member in members]
    rows = rows_of_groups(groups)
    changes = [change_of(row, names) for row in rows]
    if as_json:
        typer.echo(json.dumps([_record(row, change) for row, change in zip(rows, changes, strict=True)], indent=2))
        return 0
    notes = [*warnings_of(rows, members)]
    if not shape.counted and shape.transformer is None:
        notes.append(
            f"{model} has names and shapes and no modules: embeddings, heads and fused layers go by names alone"
        )
    _print(f"{shape.name} {shape.counted}".strip(), rows, changes, notes)
    return 0


def _params(config: Path | None, given: str | None) -> dict[str, Any]:
    """The optimizer's parameters, of the JSON or of the flag."""
    from ds_optim.job.deepspeed_json import section_of
    from ds_optim.job.settings import parse_object
    from ds_optim.zero.reading import load_config

    if config is not None and given is not None:
        raise UserError("give --config or --optimizer-params, one of the two")
    if given is not None:
        return parse_object(given, "--optimizer-params")
    return {} if config is None else section_of(section_of(load_config(config), "optimizer"), "params")


def _record(row: Route, change: str) -> dict[str, Any]:
    return {**asdict(row), "shape": list(row.shape), "matched": list(row.matched), "change": change}


def _print(title: str, rows: Sequence[Route], changes: Sequence[str], notes: Sequence[str]) -> None:
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    total = sum(row.numel for row in rows)
    table = Table(title=f"{title}: {total:,} parameters to step", title_justify="left", header_style="bold")
    for name in ("Role", "Parameters", "Count", "Seen as", "Why", "Elements"):
        table.add_column(name, justify="right" if name in ("Count", "Elements") else "left", overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.role != row.role:
            table.add_section()
        cells = (row.role, row.names, str(row.count), row.seen, row.why, f"{row.numel:,}")
        table.add_row(*map(escape, cells))
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    lines = [f"  {row.names}: {change}" for row, change in zip(rows, changes, strict=True) if change]
    for line in (*notes, 'To have one otherwise, in "optimizer": {"params": {…}}:', *lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
