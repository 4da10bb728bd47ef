"""The command ``ds-optim simulate``: its flags, and the table that it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.memory.simulate import Simulated


def simulate(
    model: Annotated[
        str | None,
        typer.Option(help="A preset, a transformers config.json or folder, a hub name, or a JSON list of parameters."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="One whose matrices travel: muon, lion_muon, spectral_lion.")] = "muon",
    count: Annotated[str | None, typer.Option("--params", hidden=True)] = None,
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "1,2,3",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "8,64,512",
    ranks_per_node: Annotated[int, typer.Option(help="Ranks of a node: bytes inside and between are told apart.")] = 8,
    optimizer_params: Annotated[
        str | None, typer.Option(help='Its parameters, as JSON: \'{"exchange": {"bucket_mb": 16}}\'.')
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON, in bytes.")] = False,
) -> int:
    """Plan the exchange of matrices on a cluster that is not there: bytes, scratch and balance of one step with them.

    ds-optim simulate --model qwen3-134m --ranks 8,64,512
    """
    from ds_optim.cli.estimate import numbers
    from ds_optim.job.settings import parse_object
    from ds_optim.memory.estimate_optimizers import plan_optimizer
    from ds_optim.memory.estimate_sources import load_shape
    from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings
    from ds_optim.memory.simulate import simulate as run

    if ranks_per_node < 1:
        raise UserError(f"--ranks-per-node is {ranks_per_node}: write a whole number from 1")
    if model is None or count is not None:
        raise UserError("give --model (a preset, a config, a parameter list): a number of parameters has no matrices")
    shape = load_shape(model, None)
    params = {} if optimizer_params is None else parse_object(optimizer_params, "--optimizer-params")
    settings = [
        ZeroSettings(stage=stage, ranks=count, dtype=dtype)
        for stage in dict.fromkeys(numbers("--stages", stages, least=0, most=3))
        for count in dict.fromkeys(numbers("--ranks", ranks, least=1))
    ]
    plan = plan_optimizer(shape, optimizer, params, weights=TORCH_DTYPES[dtype])
    if not any(group.shape for group in plan.groups):
        raise UserError(f"no matrices travel for {optimizer}: name one that works on whole ones, such as muon")
    found = [run(shape, plan, zero, ranks_per_node) for zero in settings]
    if as_json:
        typer.echo(json.dumps([{**asdict(row), "formula": row.formula} for row in found], indent=2))
    else:
        _print(f"{shape.name}: {shape.numel:,} parameters, {optimizer}", found)
    return 0


def _print(title: str, rows: Sequence[Simulated]) -> None:
    """A table for each stage, a column for each number of ranks."""
    import sys
    from itertools import groupby

    from rich.console import Console

    from ds_optim.report.blocks import Column, blocks

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(title, markup=False, highlight=False)
    for stage, same in groupby(rows, key=lambda row: row.stage):
        columns = [Column(name=f"{row.ranks:,} rank{'s' * (row.ranks > 1)}", cells=_cells(row)) for row in same]
        for table in blocks(f"ZeRO-{stage}, of a rank and step", _LABELS, columns, console.width):
            console.print(table)
    better = [
        f'At stage 3 on {row.ranks} ranks "sub_group_size": {row.better_size} brings {row.makespan:.3f} to '
        f"{row.better_makespan:.3f}."
        for row in rows
        if row.better_size is not None
    ]
    shared = [
        f'At stage {row.stage} on {row.ranks} ranks "exchange": {{"share": "auto"}} brings {row.makespan:.3f} to '
        f"{row.shared_makespan:.3f}."
        for row in rows
        if row.shared_makespan is not None
    ]
    for line in (*_NOTES, *better, *shared):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


_LABELS = (
    ("sent", "of it between nodes", "most of a rank", "2(N-1)/N² of matrices", "scratch"),
    ("matrices", "shared by ranks", "busiest / bound", "waiting"),
)
_NOTES = (
    "Sent: for one step that brings matrices together, there and back, the mean; LionMuon does so every P-th step.",
    "Busiest / bound: the busiest owner's modelled work over max(mean, largest matrix). Waiting: of all ranks' time.",
    "ZeRO-3 steps one sub-group after the other: busiest is the sum over them, the bound that of all at once.",
)


def _cells(row: Simulated) -> list[str]:
    from ds_optim.report.units import MISSING, fixed, size

    share = f"{100 * row.between / row.mean_bytes:.0f} %" if row.mean_bytes else MISSING
    formula = size(row.formula) if row.stage == 3 else MISSING
    work = [fixed(row.jobs, 1), f"{row.shared:,}", fixed(row.makespan, 3), f"{100 * row.idle:.1f} %"]
    return [size(row.mean_bytes), share, size(row.most_bytes), formula, size(row.scratch), *work]
