"""The estimate of activations and of the peak, against what real engines held: tiny models of four architectures.

    python -m benchmarks.peaks [--out benchmarks/results/peaks.jsonl] [--models qwen3,gpt2]

A cell is an architecture, a stage, gradient checkpointing on or off, a sequence length and a micro-batch; two ranks
train in bf16 with Lion, and a step of each shape is measured: live tensors on a CPU, the allocator on a GPU. Exits 1
where a peak is more than 5 % off.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ds_optim.bench.ranks import run
from ds_optim.report.machine import describe_machine
from ds_optim.report.schema import Row, append_row

ALLOWED = 0.05
RANKS = 2
SEQUENCES, BATCHES = (32, 256), (1, 4)
_VOCABULARY, _BUCKET = 1024, 200_000
_UNMEASURED = 2
"""Steps until state and ZeRO-3's record of what comes when are there."""
_WIDTHS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": _VOCABULARY}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**_WIDTHS, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512},
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": _VOCABULARY},
    "llama": {**_WIDTHS, "num_key_value_heads": 4, "intermediate_size": 512},
    "mixtral": {**_WIDTHS, "num_key_value_heads": 2, "intermediate_size": 256, "num_local_experts": 4},
}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What cells of all shapes share."""

    model: str
    stage: int
    checkpointing: bool
    accumulation: int = 1

    def json(self) -> dict[str, Any]:
        zero = {"stage": self.stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
        zero |= {"stage3_prefetch_bucket_size": _BUCKET, "stage3_param_persistence_threshold": 1000}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": {"enabled": True},
            "optimizer": {"type": "lion", "params": {"lr": 1e-4}},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Bytes of the fuller rank, estimated and measured."""

    engine: Engine
    seq_len: int
    micro_batch: int
    activations: tuple[int, int]
    peak: tuple[int, int]

    @property
    def off(self) -> float:
        """Of the peak."""
        return self.peak[0] / self.peak[1] - 1

    @property
    def activations_off(self) -> float:
        return self.activations[0] / self.activations[1] - 1


def config_of(model: str) -> Any:
    from transformers import AutoConfig

    # Ids of special tokens lie outside of so small a vocabulary.
    return AutoConfig.for_model(model, **MODELS[model], use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def engines(models: Sequence[str]) -> Iterator[Engine]:
    """The first model at all stages, and with accumulation; the others where gradients or weights are sharded."""
    for model in models:
        first = model == models[0]
        for stage in (0, 1, 2, 3) if first else (2, 3):
            for checkpointing in (False, True):
                yield Engine(model=model, stage=stage, checkpointing=checkpointing)
            if first and stage:
                yield Engine(model=model, stage=stage, checkpointing=False, accumulation=2)


def measure(rank: int, world_size: int, engine: Engine, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """By shape (sequence, micro-batch): activations that the forward pass left, and the peak of a step, bytes."""
    import deepspeed

    import ds_optim
    from ds_optim.job.models import build_model
    from ds_optim.memory.measure import MemoryWatch

    deepspeed.logger.setLevel("ERROR")
    found = []
    with MemoryWatch() as watch:
        before = watch.held()
        model: Any = build_model(config_of(engine.model), 0)
        if engine.checkpointing:
            model.gradient_checkpointing_enable()
        started, *_ = ds_optim.initialize(model=model, config=engine.json())
        del model
        for _ in range(_UNMEASURED):
            _step(started, engine, watch, shapes[0])
        for shape in shapes:
            gc.collect()
            watch.reset()
            kept = _step(started, engine, watch, shape)
            found.append((kept, watch.peak().allocated - before))
        started.destroy()
    return found


def _step(engine: Any, of: Engine, watch: Any, shape: tuple[int, int]) -> int:
    """The activations of the last of its micro-batches."""
    from ds_optim.job.models import next_token_losses
    from ds_optim.machine.ranks import device
    from ds_optim.memory.account import account

    kept = 0
    seq_len, micro_batch = shape
    for _ in range(of.accumulation):
        windows = torch.randint(0, _VOCABULARY, (micro_batch, seq_len + 1)).to(device())
        gathered, before = account(engine).weights, watch.held()
        loss = next_token_losses(engine, windows).mean()
        kept = watch.held() - before
        kept -= account(engine).weights - gathered
        engine.backward(loss)
        engine.step()
    return kept


def estimated(engine: Engine, seq_len: int, micro_batch: int, device: str) -> tuple[int, int]:
    """The same of the estimate."""
    from ds_optim.job.models import build_model
    from ds_optim.memory.estimate import estimate
    from ds_optim.memory.estimate_model import shape_of_module
    from ds_optim.memory.estimate_optimizers import plan_optimizer
    from ds_optim.memory.estimate_passes import Batch, ModelPasses
    from ds_optim.memory.estimate_sources import zero_settings
    from ds_optim.memory.estimate_terms import ZeroSettings

    config = config_of(engine.model)
    with torch.device("meta"):
        model = shape_of_module(engine.model, build_model(config, 0), config=config)
    given = zero_settings(engine.json(), model)
    zero = ZeroSettings(stage=engine.stage, ranks=RANKS, accumulation=engine.accumulation, device=device, **given)
    memory = estimate(model, plan_optimizer(model, "lion", device=device), zero).largest
    batch = Batch(micro_batch=micro_batch, seq_len=seq_len, checkpointing=engine.checkpointing, device=device)
    passes = ModelPasses(model, batch).own
    return passes.kept, memory.peak(passes)


def cells(engine: Engine, shapes: Sequence[tuple[int, int]], device: str = "cpu") -> Iterator[Cell]:
    """Of one engine, in fresh processes."""
    ranks = run(RANKS, measure, engine, shapes)
    for number, (seq_len, micro_batch) in enumerate(shapes):
        kept, peak = (max(rank[number][which] for rank in ranks) for which in (0, 1))
        guessed = estimated(engine, seq_len, micro_batch, device)
        yield Cell(
            engine=engine,
            seq_len=seq_len,
            micro_batch=micro_batch,
            activations=(guessed[0], kept),
            peak=(guessed[1], peak),
        )


def line(cell: Cell) -> str:
    how = "checkpointed" if cell.engine.checkpointing else ""
    return (
        f"{cell.engine.model:8} stage {cell.engine.stage} x{cell.engine.accumulation} {how:12} {cell.micro_batch} x "
        f"{cell.seq_len:<4} activations {cell.activations[0]:>11,} / {cell.activations[1]:>11,} "
        f"{cell.activations_off:+7.2%}   peak {cell.peak[0]:>11,} / {cell.peak[1]:>11,} {cell.off:+7.2%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    stamp = {"machine": describe_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    shapes = [(seq_len, micro_batch) for seq_len in SEQUENCES for micro_batch in BATCHES]
    found: list[Cell] = []
    for engine in engines(given.models.split(",")):
        for cell in cells(engine, shapes, "cuda" if torch.cuda.is_available() else "cpu"):
            print(line(cell), flush=True)
            found.append(cell)
            if given.out is not None:
                extra = {**asdict(cell), "peak_off": round(cell.off, 5), **stamp}
                row = Row(kind="peaks", optimizer="lion", stage=engine.stage, ranks=RANKS, dtype="bf16", extra=extra)
                append_row(given.out, row)
    for what, shares in (("activations", [c.activations_off for c in found]), ("peak", [c.off for c in found])):
        worst = max(shares, key=abs)
        print(f"{what}: {len(shares)} cells, worst {worst:+.2%}, median {statistics.median(map(abs, shares)):.2%}")
    return 0 if all(abs(cell.off) <= ALLOWED for cell in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
