"""The command ``ds-optim suggest``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds_optim.cli.model_flags import MODEL, Attention, Checkpointing, GpuMemory, LigerLoss, Lora, LossChunks, SeqLen
from ds_optim.machine.kept_results import write_one

if TYPE_CHECKING:
    from ds_optim.memory.suggest import Suggestion


def suggest(
    source: Annotated[Path, typer.Option("--from", help="Your DeepSpeed JSON for AdamW.")],
    model: Annotated[str, typer.Option(help=MODEL)],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the run.")],
    gpu_memory: GpuMemory = None,
    seq_len: SeqLen = 1024,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences a rank takes at once, in place of the JSON's.")
    ] = None,
    checkpointing: Checkpointing = False,
    attention: Attention = "sdpa",
    loss_chunks: LossChunks = 1,
    liger_loss: LigerLoss = False,
    lora: Lora = None,
    lr: Annotated[float | None, typer.Option(help="AdamW's learning rate, where the JSON does not say.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay, likewise.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the new JSON, in place of stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that says something else.")] = False,
) -> int:
    """Say which optimizer to take in AdamW's place, what it saves and why, and write the JSON for it.

    ds-optim suggest --from ds.json --model meta-llama/Llama-3.1-8B --ranks 8 --gpu-memory 80GiB
    """
    from ds_optim.memory.estimate_fit import parse_size
    from ds_optim.memory.estimate_sources import load_shape
    from ds_optim.memory.suggest import suggest as suggestion
    from ds_optim.zero.reading import load_config

    found = suggestion(
        load_config(source),
        load_shape(model, None, seq_len, lora=lora),
        ranks=ranks,
        gpu_bytes=None if gpu_memory is None else parse_size(gpu_memory),
        seq_len=seq_len,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        attention=attention,
        loss_chunks=loss_chunks,
        liger_loss=liger_loss,
        lr=lr,
        weight_decay=weight_decay,
    )
    text = json.dumps(found.converted.config, indent=2) + "\n"
    if out is not None:
        write_one(out, text, "config", force=force)
    _explain(found, on_stderr=out is None)  # the JSON alone is what stdout is read for
    if out is None:
        typer.echo(text, nl=False)
    return 0


def _explain(found: Suggestion, *, on_stderr: bool) -> None:
    """The choice and its reasons, the figures, and each change of the JSON."""
    import sys

    from rich.console import Console

    from ds_optim.report.estimate_table import to_tables
    from ds_optim.report.suggest import sentences

    stream = sys.stderr if on_stderr else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 120)
    for line in sentences(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in to_tables(found.rows, console.width):
        console.print(table)
    lines = [*found.converted.changes]
    if found.converted.left:
        lines.append(f'"auto", which a trainer fills in: {", ".join(found.converted.left)}')
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
