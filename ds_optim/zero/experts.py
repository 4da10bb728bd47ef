"""Models with experts in groups of their own: what DeepSpeed 0.19.8 trains, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_optim.errors import UserError
from ds_optim.zero.auto import at


def check_experts(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse at stage 3 what DeepSpeed refuses there for any optimizer, before it makes partitions.

    Raises:
        UserError: a layer of ``deepspeed.moe.layer.MoE`` at stage 3.
    """
    if str(at(config, "zero_optimization.stage")) != "3":
        return
    for name, module in model.named_modules():
        if any(cls.__name__ == "MoE" and cls.__module__.startswith("deepspeed.") for cls in type(module).__mro__):
            raise UserError(
                f"{name or 'the model'} is a DeepSpeed MoE layer, which DeepSpeed 0.19 does not train at stage 3: set "
                "zero_optimization.stage to 2"
            )
