"""Says that an optimizer was built and never stepped, while another one steps what it was built for.

Under offload Accelerate puts DeepSpeed's CPU Adam in its place, with its groups; under DeepSpeed transformers' Trainer
drops the ``optimizers`` that it is given and makes its own. Neither asks the optimizer that it replaces, so torch's
hook on the steps of all optimizers is asked, until each of ours has stepped.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("ds_optim")

# Who steps the same parameters with two optimizers may begin with either; after so many calls it is no beginning.
_PATIENCE = 10
_RECORDS = 64
_IDLE = "_ds_optim_idle"
_NEVER = "was built and never stepped; {} steps its {}: {}"
_FORCED = (
    'under offload set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config, or hand over the one that '
    "ds_optim.from_config returns"
)
_DROPPED = (
    "transformers' Trainer drops optimizers=(...) under DeepSpeed; it takes optimizer_cls_and_kwargs, or the JSON's "
    "optimizer with ds_optim.hf.OptimizerFromConfig"
)


@dataclass(eq=False)
class _Record:
    """An optimizer that has not stepped: its class, the rules of its groups, and itself while somebody holds it.

    ``by`` is the class of another that steps its parameters, ``calls`` how often it was seen to.
    """

    name: str
    rules: frozenset[str]
    optimizer: weakref.ref[Optimizer]
    by: str = ""
    calls: int = 0


_waiting: deque[_Record] = deque(maxlen=_RECORDS)
_hook: list[RemovableHandle] = []


def watch(optimizer: Optimizer) -> None:
    """Wait for the first step of ``optimizer``, which is not kept alive; nor are its parameters referred to."""
    rules = frozenset(group["rule"] for group in optimizer.param_groups)
    _waiting.append(_Record(type(optimizer).__name__, rules, weakref.ref(optimizer)))
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    ours = any(cls.__name__ == "ZeroOptimizer" for cls in type(optimizer).__mro__)
    rules = {group.get("rule") for group in optimizer.param_groups} - {None}
    for record in reversed(list(_waiting)):
        replaced = record.optimizer()
        if replaced is optimizer:
            _waiting.remove(record)
        elif not ours and rules & record.rules:
            _waiting.remove(record)
            _say(record.name, _NEVER.format(type(optimizer).__name__, "groups", _FORCED))
            break
        elif ours or replaced is None or record.calls >= _PATIENCE:
            continue
        elif _steps_parameters_of(optimizer, replaced):
            record.by, record.calls = type(optimizer).__name__, record.calls + 1
            if record.calls == _PATIENCE:
                _say_of_parameters(record)
    if not _waiting and _hook:
        _hook.pop().remove()


def _steps_parameters_of(optimizer: Optimizer, replaced: Any) -> bool:
    """Whether ``optimizer`` holds the first parameter of a group, or the partition that ZeRO has put it into."""
    held = [t for group in optimizer.param_groups for t in group["params"]]
    identities = {id(t) for t in held}
    for p in (members[0].parameter for members in replaced.members if members):
        zero, mapping = getattr(p, "_z3_optimizer", None), getattr(p, "_hp_mapping", None)
        if id(p) in identities or (zero is not None and getattr(zero, "optimizer", None) is optimizer):
            return True
        place = None if mapping is None else mapping.hp_fragment.untyped_storage().data_ptr()
        if place is not None and any(t.untyped_storage().data_ptr() == place for t in held):
            return True
    return False


def warn_if_idle(optimizer: Optimizer, tensors: Sequence[Sequence[Tensor]]) -> None:
    """Say once that no parameter has a gradient: others may have taken their places in the model."""
    if getattr(optimizer, _IDLE, False) or any(t.grad is not None for unit in tensors for t in unit):
        return
    setattr(optimizer, _IDLE, True)
    _say(
        type(optimizer).__name__,
        "was stepped and none of its parameters has a gradient: nothing was changed. Build it after whatever replaces "
        "the model's parameters; fully_shard is not supported: train through DeepSpeed's ZeRO instead",
    )


@atexit.register
def _at_end() -> None:
    """Of runs that were too short to be told before."""
    for record in _waiting:
        if 0 < record.calls < _PATIENCE:
            _say_of_parameters(record)


def _say_of_parameters(record: _Record) -> None:
    _say(record.name, _NEVER.format(record.by, "parameters", _DROPPED))


def _say(name: str, what: str) -> None:
    """One line, on rank 0."""
    first = dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"
    if first:
        logger.warning("ds_optim: %s %s", name, what)
