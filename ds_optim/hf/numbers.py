"""What to log of an optimizer that somebody's wrapper holds."""

from __future__ import annotations

from typing import Any

from ds_optim.optimizers import ZeroOptimizer


def stepping(optimizer: Any) -> ZeroOptimizer:
    """The optimizer behind the wrappers of Accelerate and ZeRO: the one that steps.

    Raises:
        RuntimeError: it is none of ds_optim's.
    """
    inner = optimizer
    while not isinstance(inner, ZeroOptimizer) and getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, ZeroOptimizer):
        raise RuntimeError(
            f"{type(inner).__name__} steps, which is none of ds_optim's optimizers: something between ds_optim and the "
            "engine replaced the one that the config names"
        )
    return inner


def numbers(optimizer: Any) -> dict[str, float]:
    """``matrix/lr`` and each other group's rate, and what ``diagnostics`` counted in the last step.

    Args:
        optimizer: ours, or what a trainer or ``accelerator.prepare`` made of it.
    """
    own = stepping(optimizer)
    rates = {f"{group['name']}/lr": float(group["lr"]) for group in own.param_groups}
    return rates | own.diagnostics
