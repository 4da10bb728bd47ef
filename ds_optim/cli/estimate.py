"""The command ``ds-optim estimate``: its flags, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_optim.cli.model_flags import (
    MODEL,
    Attention,
    Checkpointing,
    GpuMemory,
    GpusPerNode,
    LigerLoss,
    Lora,
    LossChunks,
    SeqLen,
)
from ds_optim.errors import UserError

if TYPE_CHECKING:
    from ds_optim.memory.estimate_model import ModelShape
    from ds_optim.memory.side_by_side import EstimateRequest

_MOST_RANKS = 100_000

_Bf16Masters = Annotated[
    bool, typer.Option("--bf16-masters", help="bf16_master_weights_and_grads with bf16_optimizer_states.")
]
_Accumulation = Annotated[
    int, typer.Option(help="Micro-batches a step; with more than one, stage 1 holds whole gradients.")
]
_OptimizerParams = Annotated[
    str | None, typer.Option(help='By optimizer, as JSON: \'{"lion_muon": {"aux": "adamw"}}\'.')
]
_Config = Annotated[Path | None, typer.Option(help="A DeepSpeed JSON, for its buckets and bf16 master weights.")]
_Tensor = Annotated[int | None, typer.Option(min=1, help="Ranks among which AutoTP cuts the model. [1]")]
_Experts = Annotated[int | None, typer.Option(min=1, help="Ranks among which AutoEP deals out experts. [1]")]
_Sequence = Annotated[int | None, typer.Option(min=1, help="Ranks that share a sequence. [1]")]


def estimate(
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    params: Annotated[float | None, typer.Option(help="In place of a model, a number of parameters: 7.5e9.")] = None,
    optimizers: Annotated[str, typer.Option(help="Names as in compare.")] = "adamw,lion,lion_muon",
    momentum_dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8; of one-buffer optimizers.")] = "float32",
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "0,1,2,3",
    ranks: Annotated[str | None, typer.Option(help="Numbers of ranks. [8]")] = None,
    nodes: Annotated[str | None, typer.Option(help="In place of ranks, numbers of nodes.")] = None,
    gpus_per_node: GpusPerNode = 8,
    offload: Annotated[bool, typer.Option("--offload", help="Optimizer state in the host's memory.")] = False,
    nvme: Annotated[bool, typer.Option("--nvme", help="The same in files, at stage 3; other stages keep it.")] = False,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    bf16_masters: _Bf16Masters = False,
    accumulation: _Accumulation = 2,
    optimizer_params: _OptimizerParams = None,
    config: _Config = None,
    tensor_parallel: _Tensor = None,
    expert_parallel: _Experts = None,
    sequence_parallel: _Sequence = None,
    gpu_memory: GpuMemory = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences a rank takes at once.")] = 1,
    seq_len: SeqLen = 1024,
    checkpointing: Checkpointing = False,
    attention: Attention = "sdpa",
    loss_chunks: LossChunks = 1,
    liger_loss: LigerLoss = False,
    lora: Lora = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON, in bytes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for curves over ranks and stages, PNG and SVG.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with sliders, which needs no other.")] = None,
) -> int:
    """Estimate what a rank will hold: no GPU, no weights, no process group.

    ds-optim estimate --model qwen3-134m --ranks 8,64 --gpu-memory 80GiB
    """
    from ds_optim.job.settings import parse_object
    from ds_optim.memory.estimate_fit import parse_size
    from ds_optim.memory.estimate_shards import parallel_of
    from ds_optim.memory.estimate_sources import load_shape, unused_keys
    from ds_optim.memory.estimate_terms import ZeroSettings
    from ds_optim.memory.side_by_side import EstimateRequest
    from ds_optim.zero.support import sequences_cut_in

    loaded = _read(config)
    shape = load_shape(model, params, seq_len, lora=lora)
    tensor, experts = parallel_of(loaded)
    cut = sequence_parallel or sequences_cut_in(loaded) or 1
    given = {"dtype": dtype, **_zero_keys(loaded, shape)}  # under autocast weights are fp32 whatever the flag says
    zero = ZeroSettings(stage=0, ranks=1, accumulation=accumulation, **given)
    request = EstimateRequest(
        model=shape,
        optimizers=tuple(dict.fromkeys(_parts("--optimizers", optimizers))),
        momentum_dtypes=tuple(dict.fromkeys(_parts("--momentum-dtype", momentum_dtype))),
        stages=tuple(dict.fromkeys(numbers("--stages", stages, least=0, most=3))),
        ranks=_ranks(ranks, nodes, gpus_per_node),
        zero=_sharded(zero, offload=offload or nvme, nvme=nvme, bf16_masters=bf16_masters or _bf16_masters(loaded)),
        optimizer_params={} if optimizer_params is None else parse_object(optimizer_params, "--optimizer-params"),
        gpu_bytes=None if gpu_memory is None else parse_size(gpu_memory),
        micro_batch=micro_batch,
        seq_len=max(1, seq_len // cut),  # a rank's part of a sequence
        checkpointing=checkpointing,
        attention=attention,
        loss_chunks=loss_chunks,
        liger_loss=liger_loss,
        tensor=tensor_parallel or tensor,
        experts=expert_parallel or experts,
        node_ranks=gpus_per_node,
        unused=unused_keys(loaded),
    )
    return run_estimate(request, as_json=as_json, out=out, html=html)


def run_estimate(request: EstimateRequest, *, as_json: bool, out: Path | None, html: Path | None) -> int:
    """Print the rows; draw the curves where ``out`` says so, and write the page to ``html``."""
    import json
    import sys

    from rich.console import Console

    from ds_optim.memory.side_by_side import estimate_rows
    from ds_optim.report.estimate import draw_curves, notes, title_of
    from ds_optim.report.estimate_page import write_page
    from ds_optim.report.estimate_table import to_tables

    rows = estimate_rows(request)
    written = [*_written("--out", out, draw_curves, request), *_written("--html", html, write_page, request)]
    if as_json:
        typer.echo(json.dumps([row.record() for row in rows], indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(title_of(request), markup=False, highlight=False)
    for table in to_tables(rows, console.width):
        console.print(table)
    for line in (*notes(request), *(f"written: {path}" for path in written)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _written(
    flag: str, place: Path | None, write: Callable[[EstimateRequest, Path], list[Path]], request: EstimateRequest
) -> list[Path]:
    """The files that a flag asks for."""
    try:
        return [] if place is None else write(request, place)
    except OSError as error:
        raise UserError(f"cannot write to {flag} {str(place)!r}: {error.strerror}") from None


def _sharded(zero: Any, **settings: bool) -> Any:
    """The settings with what stage 0 has not: rows of that stage are estimated without."""
    from dataclasses import replace

    return replace(zero, stage=3, **settings) if any(settings.values()) else zero


def _read(config: Path | None) -> dict[str, Any]:
    from ds_optim.job.deepspeed_json import section_of
    from ds_optim.zero.reading import load_config
    from ds_optim.zero.values import understood

    if config is None:
        return {}
    loaded = load_config(config)
    # The stages that are estimated are the flags', not the JSON's.
    return understood({**loaded, "zero_optimization": {**section_of(loaded, "zero_optimization"), "stage": "auto"}})


def _bf16_masters(loaded: dict[str, Any]) -> bool:
    """Whether a DeepSpeed JSON keeps master weights in bf16; what is not supported beside them is refused."""
    from ds_optim.zero.support import check_config, uses_bf16_masters

    if not uses_bf16_masters(loaded):
        return False
    zero = loaded["zero_optimization"]
    sections: dict[str, Any] = {key: loaded[key] for key in ("bf16", "bfloat16", "data_types") if key in loaded}
    check_config({**sections, "zero_optimization": {**zero, "stage": 3}})
    return True


def _zero_keys(loaded: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    """What a DeepSpeed JSON says of buckets and gradients; offload and bf16 master weights have flags of their own."""
    from ds_optim.memory.estimate_sources import zero_settings

    settings = zero_settings(loaded, shape)
    return {name: value for name, value in settings.items() if name not in ("offload", "nvme", "bf16_masters")}


def _ranks(ranks: str | None, nodes: str | None, gpus_per_node: int) -> tuple[int, ...]:
    if ranks is not None and nodes is not None:
        raise UserError("give --ranks or --nodes, one of the two")
    if nodes is None:
        return tuple(dict.fromkeys(numbers("--ranks", ranks or "8", least=1)))
    return tuple(dict.fromkeys(count * gpus_per_node for count in numbers("--nodes", nodes, least=1)))


def numbers(flag: str, text: str, *, least: int, most: int = _MOST_RANKS) -> list[int]:
    """The whole numbers of a comma-separated list; raises ``UserError`` for anything else."""
    found = []
    for part in _parts(flag, text):
        if not part.isdecimal() or not least <= int(part) <= most:
            raise UserError(f"{flag}: {part!r} is no whole number from {least} to {most:,}; write a list such as 1,2")
        found.append(int(part))
    return found


def _parts(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{flag} is empty: write a comma-separated list")
    return parts
