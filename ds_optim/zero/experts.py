"""Models with experts in groups of their own: what DeepSpeed 0.19.8 trains, and what it does not.

DeepSpeed's AutoEP puts layers of its own in the place of a model's experts while it builds an engine: an optimizer of
those has to be built after that, when DeepSpeed asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.sharding.binding import Member, experts_of
from ds_optim.sharding.comm import Comm
from ds_optim.zero.auto import at
from ds_optim.zero.refused import ZERO, is_false, is_true

_STALE = (
    "expert_parallel.enabled puts other parameters in the place of the experts after the optimizer was built: name the "
    "optimizer in the config, and hand model and config to ds_optim.initialize"
)


class BuiltLater:
    """Builds an optimizer when DeepSpeed calls it, over the parameters that the model has then."""

    def __init__(self, build: Callable[[], ZeroOptimizer]) -> None:
        self._build = build
        self.optimizer: ZeroOptimizer | None = None

    def __call__(self, parameters: Any) -> ZeroOptimizer:
        self.optimizer = self._build()
        return self.optimizer


def replaces_experts(config: Any) -> bool:
    """Whether a config switches AutoEP on."""
    return isinstance(config, Mapping) and is_true(at(config, "expert_parallel.enabled"))


def experts_over(config: Any) -> int:
    """Among how many ranks AutoEP deals out a model's experts; 1 without it."""
    return int(at(config, "expert_parallel.autoep_size") or 1) if replaces_experts(config) else 1


def check_built_later(config: Mapping[str, Any]) -> None:
    """Refuse an optimizer of parameters that AutoEP will replace.

    Raises:
        UserError: with what to do instead.
    """
    if replaces_experts(config):
        raise UserError(_STALE)


def check_all_given(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> None:
    """Refuse a choice of parameters where AutoEP will replace some of them.

    Raises:
        UserError: not all trainable parameters were given.
    """
    given = None if parameters is None else {id(p) for p in parameters}
    if given is not None and not {id(p) for p in model.parameters() if p.requires_grad} <= given:
        raise UserError(
            "model_parameters leaves some out and expert_parallel.enabled replaces others: leave it out, and freeze "
            "what is not to be trained"
        )


def check_live(engine: Any, members: Sequence[Sequence[Member]]) -> None:
    """Refuse an optimizer whose parameters AutoEP has replaced.

    Raises:
        UserError: with what to do instead.
    """
    if replaces_experts(getattr(engine, "config", None)):
        live = {id(p) for p in engine.module.parameters()}
        if any(id(m.parameter) not in live for group in members for m in group):
            raise UserError(_STALE)


def check_alone(engine: Any, tensor: Comm | None, members: Sequence[Sequence[Member]]) -> None:
    """Refuse experts beside parallelism that they were not tried with.

    Raises:
        UserError: naming it.
    """
    sequences = int(getattr(engine, "sequence_parallel_size", None) or 1) > 1
    if not (sequences or tensor is not None) or not any(experts_of(m.parameter) for group in members for m in group):
        return
    raise UserError(
        f"experts in groups of their own are not supported beside {'sequence' if sequences else 'tensor'} parallelism: "
        "set its size to 1"
    )


def check_experts(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse, before partitions are made, where DeepSpeed trains experts for no optimizer, or not as it ought to.

    Raises:
        UserError: with what to write instead.
    """
    replaced = replaces_experts(config)
    name = next((name for name, module in model.named_modules() if _is_moe(module)), None)
    if name is None and not replaced:
        return
    stage = str(at(config, f"{ZERO}.stage"))
    if name is not None and stage == "3":
        raise UserError(
            f"{name or 'the model'} is a DeepSpeed MoE layer, which DeepSpeed 0.19 does not train at stage 3: set "
            f"{ZERO}.stage to 2"
        )
    if stage == "1" and is_false(at(config, f"{ZERO}.contiguous_gradients")):
        raise UserError(
            f"{ZERO}.contiguous_gradients = false is not supported at stage 1 with experts: DeepSpeed 0.19 sums those "
            "of different experts together; leave it true"
        )
    if replaced and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "expert_parallel.enabled is not supported for a model that was made under deepspeed.zero.Init: what AutoEP "
            "puts into it is in other groups of ranks than the rest. Make the model without it"
        )


def _is_moe(module: nn.Module) -> bool:
    return any(cls.__name__ == "MoE" and cls.__module__.startswith("deepspeed.") for cls in type(module).__mro__)
