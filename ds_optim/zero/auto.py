"""What "auto" in a DeepSpeed config becomes, and who fills it in.

``transformers``' Trainer and Accelerate fill "auto" in from arguments of their own, ``ds-optim train`` from its flags.
``ds_optim.initialize`` has no arguments: it derives what follows from the rest of the config and from the model, as
``transformers`` does, and refuses what only a caller can say. What is left is DeepSpeed's default, by its own reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_optim.errors import UserError

AUTO = "auto"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
#: What only a caller can fill in, and what to write without one: DeepSpeed would take its default in silence.
CALLERS = {
    "bf16.enabled": "true or false",
    "bfloat16.enabled": "true or false",
    "fp16.enabled": "true or false",
    "gradient_clipping": "a number, such as 1.0",
    "zero_optimization.stage": "0, 1, 2 or 3",
    "zero_optimization.offload_optimizer.device": '"cpu" or "none"',
    "zero_optimization.offload_param.device": '"cpu" or "none"',
}
_OWN = ("optimizer.params.heads",)
"""Where "auto" is a value of ours, which nobody fills in."""


def is_open(path: str, value: Any) -> bool:
    """Whether a value is an "auto" that somebody is to fill in."""
    return bool(value == AUTO) and path not in _OWN


def fill_auto(config: dict[str, Any], hidden_size: int | None) -> None:
    """Fill "auto" in, in place, with what follows from the config and the model.

    Args:
        hidden_size: of the model; None where it tells none, which leaves ZeRO's buckets to DeepSpeed's defaults.

    Raises:
        UserError: what cannot be derived, and what to write.
    """
    for key in BATCH_KEYS:
        if config.get(key) == AUTO:
            del config[key]  # DeepSpeed derives it from the others
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and hidden_size is not None:
        zero |= {key: size for key, size in sizes_by_width(hidden_size).items() if zero.get(key) == AUTO}
    _fill_scheduler(config)
    check_filled(config)


def check_filled(config: Mapping[str, Any]) -> None:
    """Refuse an "auto" that only a caller can fill in, and none has.

    Raises:
        UserError: naming the setting and what to write.
    """
    values = dict(CALLERS)
    for section in ("optimizer", "scheduler"):
        params = at(config, f"{section}.params")
        values |= {f"{section}.params.{key}": "a value" for key in (params if isinstance(params, Mapping) else ())}
    for path, write in values.items():
        if is_open(path, at(config, path)):
            raise UserError(
                f'{path} is "auto", which Trainer, Accelerate and ds-optim train fill in from their own arguments; '
                f"here there are none: write {write}"
            )


def sizes_by_width(hidden_size: int) -> dict[str, int]:
    """ZeRO's sizes in elements, as ``transformers`` derives them of a model's hidden size."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def hidden_size_of(config: Any) -> int | None:
    """The hidden size in a ``transformers`` config, the largest where there are several; None where it names none."""
    for owner in (config, getattr(config, "text_config", None)):
        found = getattr(owner, "hidden_size", None) or getattr(owner, "hidden_sizes", None)
        if found:
            return int(max(found) if isinstance(found, (list, tuple)) else found)
    return None


def batch_sizes(config: Mapping[str, Any], ranks: int) -> tuple[int, int, int]:
    """(global batch, micro-batch, accumulation), each derived as DeepSpeed does where it is not given or "auto".

    Raises:
        UserError: nothing to derive them from, or numbers that do not go together.
    """
    given = {key: config.get(key) for key in BATCH_KEYS}
    total, micro, steps = (None if value in (None, AUTO) else int(value) for value in given.values())
    if total is None and micro is None:
        raise UserError('the config gives no batch size: write "train_micro_batch_size_per_gpu", such as 8')
    if total is None:
        assert micro is not None
        return micro * (steps or 1) * ranks, micro, steps or 1
    derived_steps = steps or (total // micro // ranks if micro else 1)
    derived_micro = micro or total // ranks // derived_steps
    product = derived_micro * derived_steps * ranks
    if product != total:
        raise UserError(
            f"train_batch_size {total} is not micro_batch {derived_micro} x accumulation {derived_steps} x {ranks} "
            f"ranks = {product}: change or leave out one of train_batch_size, train_micro_batch_size_per_gpu and "
            "gradient_accumulation_steps"
        )
    return total, derived_micro, derived_steps


def at(config: Mapping[str, Any], path: str) -> Any:
    """The value at "a.b" of nested objects; None where there is none."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _fill_scheduler(config: dict[str, Any]) -> None:
    """Rates of a warmup, as ``transformers`` fills them: from 0, to the optimizer's."""
    params = at(config, "scheduler.params")
    if not isinstance(params, dict):
        return
    for key, value in (("warmup_min_lr", 0.0), ("warmup_max_lr", at(config, "optimizer.params.lr"))):
        if params.get(key) == AUTO and value is not None:
            params[key] = value
