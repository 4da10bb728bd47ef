"""A Trainer's callback that checks which optimizer steps, and logs its numbers."""

from __future__ import annotations

from typing import Any

import transformers
from torch.optim import Optimizer

from ds_optim.hf.numbers import numbers, stepping


class OptimizerCallback(transformers.TrainerCallback):
    """Logs each group's learning rate and what ``diagnostics`` counts, of the last step.

    ``OptimizerFromConfig`` brings it along; for trainers that build the optimizer otherwise, pass it in
    ``callbacks=[…]``. What it adds is in ``state.log_history``, and in what callbacks after it report.

    Raises:
        RuntimeError: at the first step, on every rank, if the optimizer that steps is none of ds_optim's.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._hooked: Optimizer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rates.clear()
        self._hooked = stepping(kwargs["optimizer"])
        self._hooked.register_step_pre_hook(self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stepping(kwargs["optimizer"]) is not self._hooked:
            raise RuntimeError(f"{type(self._hooked).__name__} was replaced after the training began")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or kwargs.get("optimizer") is None:
            return
        added = numbers(kwargs["optimizer"]) | self._rates
        logs |= added
        state.log_history[-1] |= added

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        """The rates as they were in the step: a schedule has moved on before anything is logged."""
        self._rates |= {f"{group['name']}/lr": float(group["lr"]) for group in optimizer.param_groups}
