"""The "optimizer" of a JSON that a trainer has read: taken out, its "auto" filled in, and built.

Trainer and Accelerate hold the JSON as a dict, and hand it to ``deepspeed.initialize`` in the end. An "optimizer" in
it goes to DeepSpeed, which does not know ours, with parameters that have lost their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import ZeroOptimizer
from ds_optim.optimizers.routes import say
from ds_optim.zero.auto import AUTO, is_open
from ds_optim.zero.config import from_config, is_ours, type_of

Section = dict[str, Any]
_FLAGS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")


def optimizer(accelerator: Any, model: nn.Module, **arguments: Any) -> ZeroOptimizer:
    """The optimizer that the DeepSpeed JSON of an ``Accelerator`` names, to be handed to ``accelerator.prepare``.

    Stands where ``accelerate.utils.DummyOptim`` would, and takes the JSON's "optimizer" out: ``prepare`` refuses one
    in both. All ranks must make this call.

    Args:
        model: before ``prepare``.
        arguments: what "auto" in the JSON's ``optimizer.params`` becomes: ``lr``, ``weight_decay``, ``betas``, …

    Raises:
        UserError: the JSON names none of ds_optim's optimizers, or what ``ds_optim.from_config`` refuses.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        raise UserError(
            "this Accelerator runs without DeepSpeed: pass it a DeepSpeedPlugin(hf_ds_config=…) with a JSON"
        )
    section = take_section(plugin.deepspeed_config)
    if section is None:
        raise UserError(
            "the Accelerator's JSON names no optimizer of ds_optim (or it was taken out before): write "
            '"optimizer": {"type": "LionMuon", "params": {…}}; for DeepSpeed\'s own use accelerate.utils.DummyOptim'
        )
    return build(model, plugin.deepspeed_config, section, arguments)


def take_section(config: dict[str, Any]) -> Section | None:
    """Take "optimizer" out of a config if it names one of ours; None, and the config as it was, otherwise.

    Raises:
        UserError: an unknown type.
    """
    if config.get("optimizer") is None or not is_ours(type_of(config["optimizer"])):
        return None
    taken: Section = config.pop("optimizer")
    return taken


def build(model: nn.Module, config: dict[str, Any], section: Section, arguments: Mapping[str, Any]) -> ZeroOptimizer:
    """The optimizer of a section that was taken out of ``config``, which gets what ZeRO needs for it.

    Raises:
        UserError: as ``ds_optim.from_config``, on every rank.
    """
    filled = {**section, "params": fill_params(section.get("params", {}), arguments)}
    built, loaded = from_config(model, {**config, "optimizer": filled})
    config |= {key: loaded[key] for key in _FLAGS if key in loaded}
    return built


def fill_params(params: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Each "auto" becomes the argument of its name, or the optimizer's own default, which is said.

    Raises:
        UserError: ``lr`` is "auto" and none was given, or an argument has no "auto" that it is for.
    """
    idle = next((key for key in arguments if key not in params), None)
    if idle is not None:
        raise UserError(f'the JSON has no optimizer.params.{idle} to fill in: write "{idle}": "auto" there')
    fixed = next((k for k, v in arguments.items() if params[k] != AUTO and params[k] != v), None)
    if fixed is not None:
        raise UserError(
            f'optimizer.params.{fixed} is {params[fixed]!r} in the JSON and {arguments[fixed]!r} in code: write "auto" '
            "into the JSON, or leave it out of the code"
        )
    if params.get("lr") == AUTO and "lr" not in arguments:
        raise UserError('optimizer.params.lr is "auto" and no rate is given: pass lr=…, or write it into the JSON')
    own = [key for key, value in params.items() if is_open(f"optimizer.params.{key}", value) and key not in arguments]
    if own:
        say(f'ds_optim: "auto" is the optimizer\'s own default for {", ".join(own)}')
    return {**{key: value for key, value in params.items() if key not in own}, **arguments}
