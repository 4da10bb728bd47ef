"""What stands beside the optimizer and cannot stay: a schedule of another rate, settings that are refused."""

from __future__ import annotations

from typing import Any

from ds_optim.zero.auto import at, is_open
from ds_optim.zero.conversion.changes import Changes
from ds_optim.zero.refused import REFUSED_SETTINGS, is_true
from ds_optim.zero.schedulers import RATES
from ds_optim.zero.support import is_autocast_unsafe, is_beside, uses_autocast

_ZERO = "zero_optimization"
GONE = (
    *("amp", "sparse_gradients", "elasticity", "nebula", "compression_training", "quantize_training", "eigenvalue"),
    *("sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
    *(f"{_ZERO}.{key}" for key in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")),
)
"""What DeepSpeed had until 0.19, which refuses a JSON that still has it."""
_OF_ITS_MUON = "DeepSpeed's Muon alone asks for it"


def scale_schedule(changes: Changes, factor: float | None) -> None:
    """A schedule of DeepSpeed's writes rates of its own over the optimizer's: they move with it.

    Args:
        factor: the new rate over the old one; None where both are the trainer's.
    """
    params = at(changes.config, "scheduler.params")
    kind = at(changes.config, "scheduler.type")
    if not isinstance(params, dict) or kind not in RATES or factor in (None, 1.0):
        return
    for key in RATES[kind]:
        value = params.get(key)
        one = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if isinstance(one, (int, float)) and not isinstance(one, bool) and one:
            assert factor is not None
            changes.set(f"scheduler.params.{key}", rounded(one * factor), "the schedule writes the optimizer's rate")


def mend(changes: Changes, *, from_muon: bool) -> None:
    """Change what is refused beside an optimizer of this package, and set what ZeRO asks for beside it."""
    config = changes.config
    for path in GONE:
        if at(config, path) is not None:
            mixed = path == "amp" and is_true(at(config, "amp.enabled"))
            changes.drop(path, "DeepSpeed 0.19 has it no more")
            if mixed:
                changes.set("bf16", {"enabled": True}, "in place of amp")
    for path, refused, remedy in REFUSED_SETTINGS:
        value = at(config, path)
        if not refused(value) or is_beside(config, path):
            continue
        if path.endswith(".device"):
            changes.set(path, "cpu", remedy)
        else:
            changes.drop(path, remedy)
        if '"bf16"' in remedy:
            changes.set("bf16", {"enabled": True}, f"in place of {path}")
    stage = at(config, f"{_ZERO}.stage") or 0
    if stage == 0 and is_true(at(config, "fp16.enabled")) and at(config, "fp16.loss_scale") != 1:
        changes.set(
            _ZERO, {**config.get(_ZERO, {}), "stage": 1}, "DeepSpeed does not scale the loss at stage 0 in fp16"
        )
    if uses_autocast(config) and is_autocast_unsafe(config):
        changes.set("torch_autocast.dtype", "bfloat16", "DeepSpeed's loss scale is wrong beside autocast in fp16")
    if from_muon:
        for key in ("reduce_scatter", "save_muon_momentum_buffer_in_memory"):
            if at(config, f"{_ZERO}.{key}") is not None:
                changes.drop(f"{_ZERO}.{key}", _OF_ITS_MUON)
    _let_zero_step(changes)


def _let_zero_step(changes: Changes) -> None:
    """``ds_optim.initialize`` sets these by itself; a trainer that builds the optimizer in code reads them here."""
    zero = changes.config.get(_ZERO)
    if not isinstance(zero, dict) or zero.get("stage", 0) == 0:
        return
    if changes.config.get("zero_allow_untested_optimizer") is not True:
        changes.set("zero_allow_untested_optimizer", True, "ZeRO steps an optimizer that is not DeepSpeed's")
    device = at(zero, "offload_optimizer.device")
    if (device not in (None, "none") or is_true(zero.get("cpu_offload"))) and changes.config.get(
        "zero_force_ds_cpu_optimizer"
    ) is not False:
        changes.set("zero_force_ds_cpu_optimizer", False, "else only DeepSpeed's CPU optimizers step offloaded state")


def rounded(value: float) -> float:
    """Without the last digits of a product: 0.1 * 3 is 0.3."""
    return float(f"{value:.12g}")


def autos(value: Any, path: str = "") -> list[str]:
    """The paths of a config that are "auto"."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in autos(inner, f"{path}.{key}" if path else key)]
    return [path] if is_open(path, value) else []
