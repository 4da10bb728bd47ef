"""The options that optimizers share, and the parameter groups that come of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.optimizers.checks import (
    check_at_least_zero,
    check_beta,
    check_betas,
    check_bool,
    check_choice,
    check_keys,
    check_positive,
    check_seed,
)
from ds_optim.optimizers.layer_scales import check_all_match
from ds_optim.optimizers.routing import MATRIX, MEMBERS, VECTOR, unnamed_group
from ds_optim.sharding.binding import check_plain

AUX_DEFAULTS: dict[str, dict[str, Any]] = {
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99)},
    "adamw": {"lr": 3e-4, "betas": (0.9, 0.95)},
    "signum": {"lr": 1e-4, "beta": 0.9},
}

EXCHANGE_DEFAULTS: dict[str, Any] = {"bucket_mb": 256, "overlap": True, "costs": "measured"}
COST_MODELS = ("measured", "modelled")


class CommonOptions(TypedDict, total=False):
    """Options of every optimizer.

    momentum_dtype: of rules whose only buffer is momentum: "float32", "bfloat16" (2 bytes a value) or "int8"
    (1.016 bytes), rounded without bias (see ``ds_optim.elementwise.momentum``); ``aux="adamw"`` keeps fp32.
    decay_1d: decay biases and gains too.
    diagnostics: count at every step what the rule does (see ``ZeroOptimizer.diagnostics``) and log it on rank 0; it
    costs a copy of the partition in work, a pass over it and a small all-reduce.
    seed: of all random numbers, those of rounding momentum and weights and a rule's own. They are a function of it, the
    step, the parameter's name and the element alone: not of ranks or stage, and a resumed run goes on with them.
    """

    momentum_dtype: str
    decay_1d: bool
    diagnostics: bool
    seed: int


class MatrixOptions(CommonOptions, total=False):
    """Options of the optimizers that treat matrices apart.

    aux: the rule for what is no matrix, "lion", "adamw" or "signum"; aux_lr, aux_betas (lion, adamw),
    aux_beta (signum) and aux_weight_decay are its hyperparameters. polar: a :class:`PolarSpec` as a dict.
    exchange: {"bucket_mb": MiB that it may hold at once, unless one matrix asks for more, "overlap": messages fly
    during work, "costs": owners get equal work by the clock, "measured", or by counted operations, "modelled"}.
    """

    aux: str
    aux_lr: float
    aux_betas: Sequence[float]
    aux_beta: float
    aux_weight_decay: float
    polar: Mapping[str, Any]
    exchange: Mapping[str, Any]


def known_keys(cls: type) -> set[str]:
    """The keyword arguments of an optimizer class, those of its options included."""
    keys: set[str] = set()
    for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            keys.add(name)
    keys -= {"self", "params"}
    return keys | set(options_of(cls).__annotations__)


def options_of(cls: type) -> type:
    """Which set of options a class takes; its own attribute says so."""
    return MatrixOptions if getattr(cls, "has_aux", False) else CommonOptions


def check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Refuse unknown and unsupported common options."""
    check_keys(cls.__name__, options, known_keys(cls))
    dtype = options.get("momentum_dtype", "float32")
    check_choice("momentum_dtype", dtype, DTYPES)
    check_bool("decay_1d", options.get("decay_1d", False))
    check_bool("diagnostics", options.get("diagnostics", False))
    check_seed(options.get("seed", 0))


def check_exchange(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise UserError(f'exchange is {options!r}: write an object such as {{"bucket_mb": 256, "overlap": true}}')
    check_keys("exchange", options, EXCHANGE_DEFAULTS)
    merged = {**EXCHANGE_DEFAULTS, **options}
    check_positive("exchange.bucket_mb", merged["bucket_mb"])
    check_bool("exchange.overlap", merged["overlap"])
    check_choice("exchange.costs", merged["costs"], COST_MODELS)
    return merged


def aux_hyper(options: Mapping[str, Any], weight_decay: float) -> tuple[str, float, float, dict[str, Any]]:
    """The aux rule: its name, learning rate, weight decay and remaining hyperparameters."""
    name = check_choice("aux", options.get("aux", "lion"), AUX_DEFAULTS)
    defaults = AUX_DEFAULTS[name]
    lr = check_at_least_zero("aux_lr", options.get("aux_lr", defaults["lr"]))
    decay = check_at_least_zero("aux_weight_decay", options.get("aux_weight_decay", weight_decay))
    takes, other = ("aux_beta", "aux_betas") if "beta" in defaults else ("aux_betas", "aux_beta")
    if other in options:
        raise UserError(f"the aux rule {name!r} takes no {other}: write {takes}")
    if takes == "aux_beta":
        return name, lr, decay, {"beta": check_beta(takes, options.get(takes, defaults["beta"]))}
    return name, lr, decay, {"betas": check_betas(takes, options.get(takes, defaults["betas"]))}


def build_groups(
    params: Any,
    *,
    rule: str,
    lr: float,
    weight_decay: float,
    hyper: Mapping[str, Any],
    options: Mapping[str, Any],
    has_aux: bool,
    by_name: bool = False,
) -> list[dict[str, Any]]:
    """Fill in what each group of ``params`` is stepped with; its members stay under ``MEMBERS``.

    A rule without aux takes every group itself.
    """
    lr = check_at_least_zero("lr", lr)
    weight_decay = check_at_least_zero("weight_decay", weight_decay)
    decay_1d = bool(options.get("decay_1d", False))
    groups = _named_groups(params, needs_groups=has_aux, needs_names=by_name)
    aux = aux_hyper(options, weight_decay) if has_aux else None
    filled = []
    for group in groups:
        name, own_lr, decay, own = rule, lr, weight_decay, dict(hyper)
        if aux is not None and group["role"] != MATRIX:
            name, own_lr, decay, own = aux
        if group["role"] == VECTOR and not decay_1d:
            decay = 0.0
        if own_lr and not lr:
            raise UserError("lr is 0 and aux_lr is not: write the peak lr and let a scheduler start it at 0")
        # One "lr" for all groups: a scheduler may set or scale it for all of them alike (see rules.rate).
        scale = own_lr / lr if lr else 1.0
        seed = options.get("seed", 0)
        filled.append({**group, "rule": name, "lr": lr, "lr_scale": scale, "weight_decay": decay, "seed": seed, **own})
    _check_members(filled)
    check_all_match(hyper.get("layer_scales", ()), [m.spec.name for group in groups for m in group[MEMBERS]])
    return filled


def _named_groups(params: Any, *, needs_groups: bool, needs_names: bool) -> list[dict[str, Any]]:
    items = list(params)
    if not items:
        raise UserError("the optimizer got no parameters: pass ds_optim.param_groups(model)")
    if all(isinstance(item, dict) for item in items):
        for group in items:
            if MEMBERS not in group:
                raise UserError(
                    "parameter groups must come from ds_optim.param_groups(model), which names their members"
                )
        return items
    if needs_groups:
        raise UserError("this optimizer asks for names and shapes of parameters: pass ds_optim.param_groups(model)")
    if needs_names and not all(isinstance(item, tuple) for item in items):
        raise UserError(
            "this optimizer asks for names of parameters: pass ds_optim.param_groups(model) or model.named_parameters()"
        )
    return unnamed_group(items)


def _check_members(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parameters that are no plain tensors or are in two groups."""
    seen: dict[int, str] = {}
    for group in groups:
        for member in group[MEMBERS]:
            check_plain(member.parameter, member.spec.name)
            if id(member.parameter) in seen:
                raise UserError(
                    f"{member.spec.name} is in the parameter groups {seen[id(member.parameter)]!r} and "
                    f"{group['name']!r}: leave it in one"
                )
            seen[id(member.parameter)] = group["name"]
