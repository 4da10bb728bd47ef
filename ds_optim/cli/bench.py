"""``ds-optim bench step|polar|wire|elementwise``. Commands import what they need when they run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.report.schema import Row
    from ds_optim.report.table import TableSpec

app = typer.Typer(
    help="Measure steps, orthogonalization, wire bytes and elementwise passes, side by side with the machine's limits.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Out = Annotated[Path | None, typer.Option(help="Folder for rows.jsonl and the report.")]
Force = Annotated[bool, typer.Option("--force", help="Replace rows of before in --out.")]
Ranks = Annotated[int | None, typer.Option(help="Processes. [a GPU each; 4 where there is none]")]
Stages = Annotated[str, typer.Option(help="ZeRO stages, comma-separated.")]
Cases = Annotated[str | None, typer.Option(help="Optimizers, comma-separated. [AdamW, DeepSpeed's Muon, ours]")]
Width = Annotated[int, typer.Option(help="The model's width.")]
Layers = Annotated[int, typer.Option(help="The model's layers.")]
Vocabulary = Annotated[int, typer.Option(help="The model's vocabulary.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def step(
    context: typer.Context,
    ranks: Ranks = None,
    stages: Stages = "1,2,3",
    cases: Cases = None,
    width: Width = 256,
    layers: Layers = 8,
    vocabulary: Vocabulary = 4096,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens a rank and step, sequences of 1024 at most; few, so that the optimizer shows."),
    ] = 64,
    accumulation: Annotated[int, typer.Option(help="Micro-batches in which a step's sequences come.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each optimizer, after one to warm up.")] = 6,
    traces: Annotated[
        Path | None, typer.Option(help="Folder for traces of a few steps, which chrome://tracing and Perfetto show.")
    ] = None,
    out: Out = None,
    force: Force = False,
) -> int:
    """Training steps and the optimizers' part in them, interleaved, against AdamW and DeepSpeed's Muon."""
    from ds_optim.bench import arguments, output, step, tables
    from ds_optim.bench.engines import SEQUENCE

    arguments.at_least("--tokens", tokens, 2)
    if tokens > SEQUENCE and tokens % SEQUENCE:
        raise UserError(f"--tokens: {tokens} are no whole sequences; write a multiple of {SEQUENCE}")
    arguments.at_least("--accumulation", accumulation, 1)
    if max(1, tokens // SEQUENCE) % accumulation:
        raise UserError(f"--accumulation: {tokens} tokens are {max(1, tokens // SEQUENCE)} sequences; write a divisor")
    arguments.at_least("--rounds", rounds, 1)
    run = _run_settings(ranks, stages, cases, width, layers, vocabulary)
    kept = None if traces is None else traces.absolute()
    settings = step.StepSettings(**run, tokens=tokens, accumulation=accumulation, rounds=rounds, traces=kept)
    title = f"Training steps, {settings.ranks} ranks, {settings.shape}, {tokens} tokens a rank"
    return _run(context, title, lambda: step.rows(settings, output.stamp()), tables.STEP, out, force)


@app.command()
def wire(
    context: typer.Context,
    ranks: Ranks = None,
    stages: Stages = "1,2,3",
    cases: Cases = None,
    width: Width = 256,
    layers: Layers = 8,
    vocabulary: Vocabulary = 4096,
    out: Out = None,
    force: Force = False,
) -> int:
    """Bytes sent per rank and step beyond AdamW's, counted twice, beside the formula."""
    from ds_optim.bench import engines, output, tables, wire

    run = _run_settings(ranks, stages, cases, width, layers, vocabulary)
    settings = wire.WireSettings(**{**run, "cases": tuple(dict.fromkeys([engines.ADAMW, *run["cases"]]))})
    title = f"Bytes on the wire, {settings.ranks} ranks, {settings.shape}"
    return _run(context, title, lambda: wire.rows(settings, output.stamp()), tables.WIRE, out, force)


@app.command()
def polar(
    context: typer.Context,
    shapes: Annotated[str | None, typer.Option(help="Rows x columns, e.g. 768x2304,4096x4096.")] = None,
    max_elements: Annotated[
        int | None, typer.Option(help="Larger shapes are named and not measured. [2^22 on a CPU, 2^26 on CUDA]")
    ] = None,
    schedules: Annotated[str, typer.Option(help="keller, you, polar_express.")] = "keller,you,polar_express",
    methods: Annotated[str, typer.Option(help="standard, gram.")] = "standard,gram",
    dtypes: Annotated[str, typer.Option(help="fp32, bf16, fp16.")] = "fp32,bf16,fp16",
    rounds: Annotated[int, typer.Option(help="Samples of each case.")] = 7,
    seconds: Annotated[
        float, typer.Option(help="What a case may take in all; one that is known to take longer is not measured.")
    ] = 20.0,
    compiled: Annotated[
        bool,
        typer.Option(help="Measure DeepSpeed's routine compiled too, as it ships; it compiles for seconds a shape."),
    ] = True,
    store: Annotated[
        bool, typer.Option("--store", help="Measure where the Gram form wins and keep it for polar's method 'auto'.")
    ] = False,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
) -> int:
    """Orthogonalization of a matrix: schedules, methods and dtypes against DeepSpeed's and the matrix rate."""
    from ds_optim.bench import arguments, output, polar, polar_table, tables
    from ds_optim.bench.limits import DTYPES
    from ds_optim.matrix.schedules import SCHEDULES

    arguments.at_least("--rounds", rounds, arguments.LEAST_ROUNDS)
    arguments.at_least("--seconds", seconds, 1e-3)
    place, missing = arguments.device(device)
    if max_elements is not None:
        arguments.at_least("--max-elements", max_elements, 1)
    settings = polar.PolarSettings(
        device=place,
        missing=missing,
        shapes=tuple(polar.SHAPES if shapes is None else arguments.shapes(shapes)),
        max_elements=polar.MAX_ELEMENTS[place.type] if max_elements is None else max_elements,
        schedules=tuple(arguments.names("--schedules", schedules, SCHEDULES)),
        methods=tuple(arguments.names("--methods", methods, polar.METHODS)),
        dtypes=tuple(arguments.names("--dtypes", dtypes, list(DTYPES))),
        rounds=rounds,
        seconds=seconds,
        compiled=compiled,
    )
    title = f"Orthogonalization, {place.type}"
    status = _run(context, title, lambda: polar.rows(settings, output.stamp()), tables.POLAR, out, force)
    if store:
        for line in polar_table.measure_and_store(settings):
            typer.echo(line)
    return status


@app.command()
def elementwise(
    context: typer.Context,
    elements: Annotated[int, typer.Option(help="Of the flat tensor; many times the caches' size.")] = 1 << 26,
    rounds: Annotated[int, typer.Option(help="Samples of each case.")] = 9,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
) -> int:
    """One pass over a flat tensor: sign steps by momentum dtype, blends and updates, against fused AdamW and a copy."""
    from ds_optim.bench import arguments, elementwise, output, tables

    arguments.at_least("--elements", elements, 256)
    arguments.at_least("--rounds", rounds, arguments.LEAST_ROUNDS)
    place, missing = arguments.device(device)
    settings = elementwise.ElementwiseSettings(device=place, missing=missing, elements=elements, rounds=rounds)
    title = f"One flat tensor of {elements:,} elements, {place.type}"
    return _run(context, title, lambda: elementwise.rows(settings, output.stamp()), tables.ELEMENTWISE, out, force)


def _run_settings(
    ranks: int | None, stages: str, cases: str | None, width: int, layers: int, vocabulary: int
) -> dict[str, Any]:
    """What ``step`` and ``wire`` both run, checked, as fields of ``RunSettings``."""
    from ds_optim.bench import arguments, engines
    from ds_optim.bench.ranks import default_ranks
    from ds_optim.machine.forked import check_ranks

    shape = engines.ModelShape(width=width, layers=layers, vocabulary=vocabulary)
    shape.check()
    ranks = default_ranks() if ranks is None else ranks
    check_ranks(ranks)
    named = arguments.names("--cases", cases or ",".join(engines.DEFAULT_CASES), list(engines.CASES))
    return {"ranks": ranks, "stages": tuple(arguments.stages(stages)), "cases": tuple(named), "shape": shape}


def _run(
    context: typer.Context,
    title: str,
    measure: Callable[[], Iterable[Row]],
    spec: TableSpec,
    out: Path | None,
    force: bool,
) -> int:
    """Measure, show, and write what ``out`` asks for. The status to exit with: 1 where nothing could be measured."""
    from ds_optim.bench import output

    output.open_folder(out, force=force)
    rows = output.collect(measure(), out)
    output.show(title, rows, spec)
    if out is not None:
        report = output.write(title, rows, spec, out, reproduce(context))
        for name, path in (("rows", out / output.ROWS), ("report", report.markdown), ("report", report.html)):
            typer.echo(f"{name}: {path}")
    return int(all("not_measured" in row.extra for row in rows))


def reproduce(context: typer.Context) -> str:
    """The command line that runs this benchmark again; options left at their defaults are left out, and of folders all
    but the name."""
    words = ["ds-optim", "bench", str(context.info_name)]
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if value is None or value == option.default or option.name == "force":
            continue
        flag = (option.opts if value else option.secondary_opts)[0]
        words += [flag] if isinstance(value, bool) else [flag, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)
