"""From a DeepSpeed JSON to an optimizer, and to the JSON that DeepSpeed should see beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS, ZeroOptimizer, known_keys, param_groups
from ds_optim.optimizers.checks import check_keys, nearest
from ds_optim.optimizers.options import BF16_AND_CAUTIOUS
from ds_optim.optimizers.registry import canonical_type
from ds_optim.optimizers.routing import ROUTING_OPTIONS
from ds_optim.zero.agree import agree_on_start, world
from ds_optim.zero.announce import announce_routes
from ds_optim.zero.experts import check_built_later, check_experts
from ds_optim.zero.reading import load_config
from ds_optim.zero.schedulers import share_config
from ds_optim.zero.support import check_config, check_model, check_parameters, uses_bf16_masters
from ds_optim.zero.values import check_monitors, understood
from ds_optim.zero.versions import check_versions

DEEPSPEED_PREFIX = "deepspeed:"
_SECTION_KEYS = ("type", "params", "legacy_fusion")
DEEPSPEED_NAMES = ("adagrad", "adam", "adamw", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")
"""DeepSpeed's own optimizers, by the names that its JSON knows."""

Config = dict[str, Any]


def is_ours(name: str) -> bool:
    return canonical_type(name) in OPTIMIZERS


def check_type(name: str) -> None:
    """Refuse a type that is neither ours, nor DeepSpeed's, nor torch's."""
    if is_ours(name) or name.lower() in DEEPSPEED_NAMES:
        return
    if name.startswith(DEEPSPEED_PREFIX):
        theirs = name.removeprefix(DEEPSPEED_PREFIX)
        if theirs.lower() not in DEEPSPEED_NAMES:
            raise UserError(f"DeepSpeed has no optimizer {theirs!r}{nearest(theirs, DEEPSPEED_NAMES)}")
        return
    candidate = getattr(torch.optim, name, None)
    if not (isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)):
        known = [*OPTIMIZERS, *DEEPSPEED_NAMES, *(f"{DEEPSPEED_PREFIX}{n}" for n in ("Lion", "Muon", "Lamb"))]
        by_lower = {k.lower(): k for k in reversed(known)}
        hint = nearest(name, by_lower)
        for lower, proper in by_lower.items():
            hint = hint.replace(f"'{lower}'", f"'{proper}'")
        raise UserError(f"unknown optimizer type {name!r}{hint}")


def from_config(
    model: nn.Module, config: str | Path | Mapping[str, Any], parameters: Iterable[nn.Parameter] | None = None
) -> tuple[ZeroOptimizer, Config]:
    """The optimizer that a DeepSpeed JSON names, and the config to hand to ``deepspeed.initialize`` with it.

    Args:
        model: whose parameters are routed by name and shape.
        config: a dict, the path of a JSON or a JSON in base64, with ``"optimizer": {"type": "LionMuon", "params":
            {…}}``.
        parameters: keep to these parameters of the model.

    Returns:
        The optimizer, and a copy of the config without "optimizer" and with what ZeRO needs for it. Each "auto" is
        still there, for Trainer and Accelerate to fill in; ``deepspeed.initialize`` by itself cannot.

    Raises:
        UserError: unknown types and keys, bad values, unsupported settings. Where ``torch.distributed`` is
            initialized it is raised on every rank, and so is a disagreement between the ranks; all of them
            must make this call then.
    """
    problem: UserError | None = None
    optimizer: ZeroOptimizer | None = None
    loaded: Config = {}
    try:
        check_versions()
        loaded = load_config(config)
        name = type_of(loaded.get("optimizer"))
        if name not in OPTIMIZERS:
            raise UserError(
                f"{name!r} is no optimizer of ds_optim{nearest(name, OPTIMIZERS)}; hand this config to "
                "deepspeed.initialize, or to ds_optim.initialize, which takes both kinds"
            )
        check_config(loaded)
        check_built_later(loaded)
        loaded = understood(loaded)
        if world().rank == 0:
            check_monitors(loaded)
        optimizer = build_optimizer(model, name, loaded, parameters)
    except UserError as error:
        problem = error
    agree_on_start(problem, model, loaded)
    assert optimizer is not None
    loaded, peaks = prepare_config(loaded), share_config(loaded, optimizer)
    announce_routes(optimizer, peaks=peaks)
    return optimizer, loaded


def type_of(section: Any) -> str:
    """The canonical optimizer type of a config's "optimizer", checked.

    Raises:
        UserError: no type, an unknown one, or keys that nothing reads.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise UserError('the config names no optimizer: write "optimizer": {"type": "LionMuon", "params": {…}}')
    check_type(section["type"])
    name = canonical_type(section["type"])
    if name in OPTIMIZERS:
        check_keys('"optimizer"', section, _SECTION_KEYS)
    if not isinstance(section.get("params", {}), Mapping):
        raise UserError(f'"optimizer": {{"params": …}} is {section["params"]!r}: write an object of parameters')
    return name


def build_optimizer(
    model: nn.Module, name: str, config: Config, parameters: Iterable[nn.Parameter] | None = None
) -> ZeroOptimizer:
    """One of our optimizers over a model, from a whole config that was checked."""
    check_model(model)
    check_experts(model, config)
    params = config["optimizer"].get("params", {})
    cls = OPTIMIZERS[name]
    check_keys(name, params, known_keys(cls) | set(ROUTING_OPTIONS))
    check_parameters(list(model.named_parameters()))
    if uses_bf16_masters(config) and params.get("cautious_decay"):
        raise UserError(BF16_AND_CAUTIOUS)
    routing = {key: params[key] for key in ROUTING_OPTIONS if key in params}
    own = {key: value for key, value in params.items() if key not in ROUTING_OPTIONS}
    return cls(param_groups(model, parameters=parameters, **routing), **own)


def prepare_config(config: Config) -> Config:
    """Take "optimizer" out and set what ZeRO asks for before it steps an optimizer that is not its own."""
    config.pop("optimizer", None)
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage", 0):
        config["zero_allow_untested_optimizer"] = True
        # "cpu_offload" is the old name of offload_optimizer, which DeepSpeed still reads.
        if zero.get("offload_optimizer") or zero.get("cpu_offload"):
            config["zero_force_ds_cpu_optimizer"] = False
    return config
