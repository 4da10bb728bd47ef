"""The estimate of a cell of ``ds-optim memory``, from the settings that the cell is run with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ds_optim.job.deepspeed_json import deepspeed_config
from ds_optim.job.models import build_model, preset_config
from ds_optim.memory.estimate import MemoryEstimate, estimate
from ds_optim.memory.estimate_model import ModelShape, shape_of_module
from ds_optim.memory.estimate_optimizers import OptimizerPlan, plan_optimizer
from ds_optim.memory.estimate_passes import Batch, ModelPasses
from ds_optim.memory.estimate_shards import parallel_of
from ds_optim.memory.estimate_sources import zero_settings
from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings
from ds_optim.memory.passes import Passes
from ds_optim.sweep.cells import Cell

#: Numbers of ranks that a saving is drawn over.
OVER_RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """What each rank of a cell is expected to hold, and the passes of one micro-batch."""

    memory: MemoryEstimate
    passes: Passes


def estimate_cell(cell: Cell, ranks: int, vocab_size: int, device: str) -> CellEstimate:
    """The estimate of a cell as it is run.

    Args:
        device: where it ran, "cuda" or "cpu".
    """
    train = cell.train
    assert train.preset is not None
    plan, zero, model = _planned(cell, ranks, vocab_size, device)
    batch = Batch(micro_batch=train.micro_batch, seq_len=train.seq_len, dtype=train.dtype, device=device)
    return CellEstimate(memory=estimate(model, plan, zero), passes=_passes(train.preset, vocab_size, batch))


def model_states_over_ranks(cell: Cell, ranks: int, vocab_size: int) -> dict[str, list[int]]:
    """By number of ranks, [model states, optimizer state] of the fullest rank: of the cell's, and powers of 2 to 64."""
    found = {}
    for count in sorted({ranks, *OVER_RANKS}):
        plan, zero, model = _planned(cell, count, vocab_size, "cpu")
        most = estimate(model, plan, zero, transients=False).largest
        found[str(count)] = [most.model_states, most.optimizer_state]
    return found


def _planned(cell: Cell, ranks: int, vocab_size: int, device: str) -> tuple[OptimizerPlan, ZeroSettings, ModelShape]:
    """The optimizer over the model's parameters, ZeRO's settings, and the model."""
    train = cell.train
    assert train.preset is not None
    model = _shape(train.preset, vocab_size, train.seq_len)
    params = train.resolved_params()
    dtype = str(params.pop("momentum_dtype", "float32"))
    config = deepspeed_config(train, ranks)
    tensor, experts = parallel_of(config)
    model = model.for_ranks(tensor, experts)
    given = {"dtype": train.dtype, **zero_settings(config, model)}
    given |= {"accumulation": train.accumulation, "device": device}
    zero = ZeroSettings(stage=train.stage, ranks=ranks // tensor, **given)
    weights = TORCH_DTYPES[train.dtype]
    plan = plan_optimizer(model, train.optimizer, params, momentum_dtype=dtype, weights=weights, device=device)
    return plan, zero, model


@lru_cache(maxsize=8)
def _shape(preset: str, vocab_size: int, seq_len: int) -> ModelShape:
    config = preset_config(preset, vocab_size, seq_len)
    with torch.device("meta"):
        return shape_of_module(preset, build_model(config, 0), config=config)


@lru_cache(maxsize=8)
def _passes(preset: str, vocab_size: int, batch: Batch) -> Passes:
    return ModelPasses(_shape(preset, vocab_size, batch.seq_len), batch).own
