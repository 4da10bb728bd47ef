"""The options that optimizers share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ds_optim.elementwise.momentum import DTYPES
from ds_optim.errors import UserError
from ds_optim.optimizers.checks import check_bool, check_choice, check_keys, check_positive, check_seed
from ds_optim.optimizers.rules import RULES

EXCHANGE_DEFAULTS: dict[str, Any] = {"bucket_mb": 256, "overlap": True, "costs": "measured", "share": False}
BF16_AND_CAUTIOUS = "cautious_decay is for fp32 master weights: take it or bf16_master_weights_and_grads out"
"""Of a change that bfloat16 has rounded nobody can tell where it went."""
COST_MODELS = ("measured", "modelled")


class CommonOptions(TypedDict, total=False):
    """Options of every optimizer.

    momentum_dtype: of rules whose only buffer is momentum: "float32", "bfloat16" (2 bytes a value) or "int8"
    (1.016 bytes), rounded without bias (see ``ds_optim.elementwise.momentum``); ``aux="adamw"`` keeps fp32.
    decay_1d: decay biases and gains too.
    cautious_decay: decay an element only where its update does not turn away from zero what decay would bring there:
    theta <- theta - lr u - lr wd theta [u theta >= 0] (Chen et al. 2025, arXiv 2510.12402), u as fp32 weights show it.
    diagnostics: count at every step what the rule does (see ``ZeroOptimizer.diagnostics``) and log it on rank 0; it
    costs a copy of the partition in work, a pass over it and a small all-reduce.
    seed: of all random numbers, those of rounding momentum and weights and a rule's own. They are a function of it, the
    step, the parameter's name and the element alone: not of ranks or stage, and a resumed run goes on with them.
    """

    momentum_dtype: str
    decay_1d: bool
    cautious_decay: bool
    diagnostics: bool
    seed: int


class MatrixOptions(CommonOptions, total=False):
    """Options of the optimizers that treat matrices apart.

    aux: the rule for what is no matrix, "lion", "adamw" or "signum"; aux_lr, aux_betas (lion, adamw),
    aux_beta (signum) and aux_weight_decay are its hyperparameters. polar: a :class:`PolarSpec` as a dict.
    exchange: {"bucket_mb": MiB that it may hold at once, unless one matrix asks for more, "overlap": messages travel
    during work, "costs": owners get equal work by the clock, "measured", or by counted operations, "modelled", "share":
    ranks of a node share the largest matrices: false, "auto" (where it pays), or how many share each}.
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
    check_bool("cautious_decay", options.get("cautious_decay", False))
    check_bool("diagnostics", options.get("diagnostics", False))
    check_seed("seed", options.get("seed", 0))


def check_exchange(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise UserError(f'exchange is {options!r}: write an object such as {{"bucket_mb": 256, "overlap": true}}')
    check_keys("exchange", options, EXCHANGE_DEFAULTS)
    merged = {**EXCHANGE_DEFAULTS, **options}
    check_positive("exchange.bucket_mb", merged["bucket_mb"])
    check_bool("exchange.overlap", merged["overlap"])
    check_choice("exchange.costs", merged["costs"], COST_MODELS)
    share = merged["share"]
    if share is not False and share != "auto" and (type(share) is not int or share < 2):
        raise UserError(f'exchange.share is {share!r}: write false, "auto", or a whole number of ranks from 2')
    return merged


def aux_options(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The aux rule's name, and its "lr" and hyperparameters as written or by default, under their own names."""
    known = {name: rule.aux for name, rule in RULES.items() if rule.aux is not None}
    name = check_choice("aux", options.get("aux", "lion"), known)
    defaults = known[name]
    takes, other = ("aux_beta", "aux_betas") if "beta" in defaults else ("aux_betas", "aux_beta")
    if other in options:
        raise UserError(f"the aux rule {name!r} takes no {other}: write {takes}")
    return name, {key: options.get(f"aux_{key}", value) for key, value in defaults.items()}
