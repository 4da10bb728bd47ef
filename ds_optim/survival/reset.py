"""Going on from a checkpoint with another optimizer: weights, schedule and place in the text, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.survival.checkpoint import position
from ds_optim.survival.checkpoint_files import guarded
from ds_optim.survival.resume import Checkpoint
from ds_optim.zero.checkpoints.safe import allowed_classes
from ds_optim.zero.swapped import FOLDER as SWAPPED
from ds_optim.zero.swapped import is_swapped

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def load_without_optimizer(engine: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Put weights and counters back, the optimizer's state left as new; return the position of the text. Collective.

    Under ZeRO in 16 bit the fp32 master weights come back exactly, whatever groups the optimizer that wrote them had.
    At stage 0 in 16 bit they start from the 16-bit weights.

    Raises:
        UserError: they lie in files that were offloaded to NVMe.
    """
    folder, tag = str(checkpoint.folder.parent), checkpoint.folder.name
    if is_swapped(engine) or (checkpoint.folder / SWAPPED).is_dir():
        raise UserError(
            "--reset-optimizer is not supported with state offloaded to NVMe: master weights lie among it, in files "
            "that DeepSpeed's own tool does not read; go on without --reset-optimizer"
        )
    with guarded(engine):
        path, state = engine.load_checkpoint(folder, tag=tag, load_module_only=True, load_lr_scheduler_states=False)
    place = position(path, state, checkpoint)
    for name in _COUNTERS:
        setattr(engine, name, state[name])
    if engine.zero_optimization():
        _set_weights(engine, _full_weights(folder, tag))
    return place


def _full_weights(folder: str, tag: str) -> dict[str, torch.Tensor]:
    """The fp32 weights of a ZeRO checkpoint by name, put together from all of its files."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _data_only():
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(folder, tag=tag)
    return weights


def _set_weights(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Set the model's weights and their masters."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0), torch.no_grad():
            # Gathered ones are taken from rank 0.
            parameter.copy_(weights[name])
    engine.optimizer.refresh_fp32_params()
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))


@contextmanager
def _data_only() -> Iterator[None]:
    """DeepSpeed's converter unpickles whatever a file holds; torch's own switch keeps it to data."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(list(allowed_classes())):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
