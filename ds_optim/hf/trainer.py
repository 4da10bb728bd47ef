"""What makes a Trainer of transformers, or any of TRL's, build the optimizer that its DeepSpeed JSON names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ds_optim.errors import UserError
from ds_optim.hf.config import Section, build, take_section
from ds_optim.zero.auto import AUTO
from ds_optim.zero.reading import load_config

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_OF_ADAM = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}
"""What Trainer fills "auto" of these with: its AdamW's, which are not meant for others where nobody set them."""


class OptimizerFromConfig(_Trainer):
    """Before a trainer among the bases of a class: its DeepSpeed JSON may name an optimizer of ds_optim.

        class MyTrainer(ds_optim.hf.OptimizerFromConfig, Trainer): ...

    "auto" in ``optimizer.params`` is filled in from the TrainingArguments, as Trainer does: ``lr``, ``weight_decay``,
    and ``betas`` and ``eps`` where ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` were set; otherwise those are
    the optimizer's own. Any other type in the JSON is left to DeepSpeed. The rates of all groups and ``diagnostics``
    are in what the trainer logs, and the first step raises if another optimizer takes it (``OptimizerCallback``).

    Raises:
        UserError: an optimizer is given in code too, or as ``ds_optim.from_config``; on every rank.
    """

    optimizer: Any
    _section: Section | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        # Trainer's set-up looks whether there is an "optimizer", and asks create_optimizer() only if not.
        self._section = None if plugin is None else take_section(plugin.deepspeed_config)
        if self._section is None:
            return
        if self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise UserError(
                f"an optimizer is given in code and in the config ({self._section['type']!r}): remove one of them"
            )
        self._section = as_written(self._section, self.args)
        from ds_optim.hf.callback import OptimizerCallback

        # First, so that those that report see what it adds.
        self.callback_handler.callbacks.insert(0, OptimizerCallback())

    def create_optimizer(self, *args: Any) -> Any:
        """The JSON's optimizer over the model as it is now, with whatever wraps it."""
        if self._section is None or self.optimizer is not None:
            return super().create_optimizer(*args)
        arguments = arguments_for(self._section.get("params", {}), self.args)
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.optimizer = build(self.model, config, self._section, arguments)
        return self.optimizer


def as_written(section: Section, arguments: Any) -> Section:
    """The section before Trainer filled "auto" in, where the JSON that it read can still be found."""
    source = getattr(arguments, "deepspeed", None) or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not isinstance(source, (str, Mapping)) or source == "none":
        return section
    found = load_config(source).get("optimizer")
    return found if isinstance(found, dict) and found.get("type") == section["type"] else section


def arguments_for(params: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """What the TrainingArguments say of each "auto" in ``params``."""
    found = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
    defaults = {field.name: field.default for field in fields(arguments)}
    for key, names in _OF_ADAM.items():
        values = [getattr(arguments, name) for name in names]
        if values != [defaults.get(name) for name in names]:
            found[key] = values if len(values) > 1 else values[0]
    return {key: value for key, value in found.items() if params.get(key) == AUTO}
