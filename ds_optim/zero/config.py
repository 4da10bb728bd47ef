"""From a DeepSpeed JSON to an optimizer, and to the JSON that DeepSpeed should see beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers import OPTIMIZERS, ZeroOptimizer, known_keys, param_groups
from ds_optim.optimizers.checks import check_keys, nearest
from ds_optim.optimizers.routes import print_routes
from ds_optim.zero.support import check_config, check_model, check_parameters

DEEPSPEED_PREFIX = "deepspeed:"
_ROUTING_KEYS = ("matrix_exclude", "views")
_DEEPSPEED_NAMES = ("adagrad", "adam", "adamw", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")

Config = dict[str, Any]


def load_config(config: str | Path | Mapping[str, Any]) -> Config:
    """A DeepSpeed config as a dict of its own, from a dict or a JSON file.

    Raises:
        UserError: the file is missing or no JSON.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    try:
        loaded = json.loads(Path(config).read_text())
    except OSError as problem:
        raise UserError(f"cannot read the DeepSpeed config {config}: {problem.strerror}") from None
    except json.JSONDecodeError as problem:
        raise UserError(f"{config} is no valid JSON (line {problem.lineno}: {problem.msg})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{config} holds no JSON object")
    return loaded


def canonical_type(name: str) -> str:
    """The name of one of our classes for ``name`` ("LionMuon", "lion_muon", "lionmuon"); others as they are."""
    plain = {key.lower(): key for key in OPTIMIZERS}
    return plain.get(name.replace("_", "").replace("-", "").lower(), name)


def is_ours(name: str) -> bool:
    return canonical_type(name) in OPTIMIZERS


def check_type(name: str) -> None:
    """Refuse a type that is neither ours, nor DeepSpeed's, nor torch's."""
    if is_ours(name) or name.lower() in _DEEPSPEED_NAMES:
        return
    if name.startswith(DEEPSPEED_PREFIX):
        theirs = name.removeprefix(DEEPSPEED_PREFIX)
        if theirs.lower() not in _DEEPSPEED_NAMES:
            raise UserError(f"DeepSpeed has no optimizer {theirs!r}{nearest(theirs, _DEEPSPEED_NAMES)}")
        return
    candidate = getattr(torch.optim, name, None)
    if not (isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)):
        known = [*OPTIMIZERS, *_DEEPSPEED_NAMES, *(f"{DEEPSPEED_PREFIX}{n}" for n in ("Lion", "Muon", "Lamb"))]
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
        config: a dict or the path of a JSON, with ``"optimizer": {"type": "LionMuon", "params": {…}}``.
        parameters: keep to these parameters of the model.

    Returns:
        The optimizer, and a copy of the config without "optimizer" and with what ZeRO needs for it.

    Raises:
        UserError: unknown types and keys, bad values, unsupported settings.
    """
    loaded = load_config(config)
    section = loaded.pop("optimizer", None)
    if not isinstance(section, dict) or "type" not in section:
        raise UserError('the config names no optimizer: write "optimizer": {"type": "LionMuon", "params": {…}}')
    name = canonical_type(str(section["type"]))
    if name not in OPTIMIZERS:
        raise UserError(f"{section['type']!r} is no optimizer of ds_optim{nearest(str(section['type']), OPTIMIZERS)}")
    check_config(loaded)
    check_model(model)
    optimizer = build_optimizer(model, name, section.get("params", {}), parameters)
    return optimizer, prepare_config(loaded)


def build_optimizer(
    model: nn.Module, name: str, params: Mapping[str, Any], parameters: Iterable[nn.Parameter] | None = None
) -> ZeroOptimizer:
    """One of our optimizers over a model, from the "params" of a JSON."""
    cls = OPTIMIZERS[name]
    check_keys(name, params, known_keys(cls) | set(_ROUTING_KEYS))
    check_parameters(list(model.named_parameters()))
    routing = {key: params[key] for key in _ROUTING_KEYS if key in params}
    own = {key: value for key, value in params.items() if key not in _ROUTING_KEYS}
    optimizer = cls(param_groups(model, parameters=parameters, **routing), **own)
    print_routes(optimizer)
    return optimizer


def prepare_config(config: Config) -> Config:
    """Set what ZeRO asks for before it steps an optimizer that is not its own."""
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage", 0):
        config["zero_allow_untested_optimizer"] = True
        if zero.get("offload_optimizer"):
            config["zero_force_ds_cpu_optimizer"] = False
    return config
