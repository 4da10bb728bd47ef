"""What one rank finds wrong is raised on all of them: the others would wait for it for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers.alike import check_alike
from ds_optim.sharding.binding import full_shape
from ds_optim.sharding.comm import Comm
from ds_optim.zero.caller import find_caller, tensor_ranks
from ds_optim.zero.pipeline import first_other, in_stages, stage_of

# Where a rank writes its own logs is its own business.
_LOCAL = ("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "steps_per_print", "wall_clock_breakdown")
_OF_GRADIENTS = (
    *("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"),
    *("prescale_gradients", "gradient_predivide_factor", "fp16", "bf16", "torch_autocast"),
)


def raise_everywhere(problem: Exception | None, comm: Comm) -> None:
    """Raise the first rank's problem on every rank of ``comm``; a collective that all of them must reach.

    Raises:
        UserError: where that problem is one.
        RuntimeError: with the rank that found it, for any other.
    """
    mine = None if problem is None else (isinstance(problem, UserError), str(problem))
    for rank, found in enumerate(comm.gather_objects(mine)):
        if found is not None:
            is_users, text = found
            if is_users:
                raise UserError(text)
            raise RuntimeError(f"ds_optim cannot step this layout (rank {rank}): {text}")


def world() -> Comm:
    """All ranks of the job; a single one where nothing is distributed."""
    return Comm.of_group(dist.group.WORLD if dist.is_initialized() else None)


def load_peers(optimizer: torch.optim.Optimizer) -> Comm | None:
    """The ranks that load together with this one; None where that is not sure.

    An engine's ``load_checkpoint`` is a call of all ranks, unless it is set to let them load one after the other.
    """
    caller = find_caller(optimizer)
    engine = caller.engine if caller is not None else None
    if engine is None or engine._config.zero_config.pipeline_loading_checkpoint:
        return None
    # Under tensor and pipeline parallelism all ranks load, each group of data-parallel ranks its own files.
    parallel = tensor_ranks(engine) is not None or in_stages(engine.module)
    return Comm.of_group(dist.group.WORLD if parallel else engine.seq_data_parallel_group)


def agree_on_start(problem: UserError | None, model: nn.Module | None, config: Mapping[str, Any] | None) -> None:
    """Before DeepSpeed's first collective: nobody has a problem, and all mean the same model and config.

    Raises:
        UserError: on every rank.
    """
    comm = world()
    raise_everywhere(problem, comm)
    parameters = [] if model is None else list(model.named_parameters())
    described = [(n, full_shape(p), str(p.dtype), p.requires_grad) for n, p in parameters]
    for what, value, remedy in (
        ("model", described, "build the same parameters, in the same order, on every rank"),
        ("config", _shared(config), "read the same config on every rank"),
    ):
        # Each stage of a pipeline has a model of its own.
        stage = stage_of(model) if what == "model" else None
        digests = comm.gather_objects((stage, hashlib.sha256(repr(value).encode()).hexdigest()))
        different = first_other(digests)
        if different is not None:
            rank, other = different
            raise UserError(f"rank {rank} has another {what} than rank {other}: {remedy}")


def agree_on_engine(engine: Any, comm: Comm) -> None:
    """The settings by which engines make gradients of one batch, where nobody compared their configs.

    Raises:
        UserError: on every rank of ``comm``, with the setting, the ranks and their values.
    """
    config: Mapping[str, Any] = engine._config._param_dict
    zero = config.get("zero_optimization")
    said = {f"config's {key}": repr(_sorted(config.get(key))) for key in _OF_GRADIENTS}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    check_alike(comm.gather_objects({**said, "config's zero_optimization.stage": str(stage)}))


def _shared(config: Mapping[str, Any] | None) -> Any:
    return _sorted({key: value for key, value in (config or {}).items() if key not in _LOCAL})


def _sorted(value: Any) -> Any:
    """Nested mappings as sorted pairs: the order in which a dict was written means nothing."""
    if isinstance(value, Mapping):
        return sorted(((str(k), _sorted(v)) for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, (list, tuple)):
        return [_sorted(v) for v in value]
    # Other objects show their address, which no two ranks share.
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
