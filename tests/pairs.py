"""Two settings of DeepSpeed at once under ``ds-optim train --config``: a row a pair, for the docs' table and its test.

Every two rows of tests/settings.py that stand in ``PAIRED`` and have a stage in common are a pair. A new setting is a
line in ``PAIRED``; what cannot be beside it is one in ``REFUSED``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tests.settings import SETTINGS

#: Short names of rows of tests/settings.py, and how losses may differ from those of plain fp32, in nats: what was
#: seen of settings that round, doubled. A rate that is wrong by a twentieth shows as 0.007.
PAIRED: Mapping[str, tuple[str, float]] = {
    "bf16": ("bf16", 2e-3),
    "fp32 sums": ("bf16, gradients accumulated in fp32 (`data_types.grad_accum_dtype`)", 2e-3),
    "bf16 masters": ("bf16 master weights, with `bf16_optimizer_states`", 2e-3),
    "autocast": ("`torch_autocast` in bf16, over fp32 weights", 2e-3),
    "clipping": ("`gradient_clipping`", 1e-4),
    "accumulation": ("`gradient_accumulation_steps` above 1", 1e-4),
    "offload": ("`offload_optimizer` to the CPU", 1e-4),
    "no reduce_scatter": ("`reduce_scatter`, on and off", 1e-4),
    "no contiguous_gradients": ("`contiguous_gradients`, on and off", 1e-4),
    "round robin": ("`round_robin_gradients`", 1e-4),
    "sub-groups": ("`sub_group_size`", 1e-4),
    "zero.Init": ("`deepspeed.zero.Init`", 1e-4),
    "AutoTP": ("AutoTP (`tensor_parallel.autotp_size`)", 1e-4),
    "sequences cut": ("`sequence_parallel_size` above 1, with ALST's `mpu`", 1e-4),
    "AutoEP": ("AutoEP (`expert_parallel.enabled`), of DeepSeek's models", 1e-4),
    "hpZ": ("ZeRO++: `zero_hpz_partition_size`", 1e-4),
    "qwZ": ("ZeRO++: `zero_quantized_weights`, its kernels stood in for", 4e-2),
    "qgZ": ("ZeRO++: `zero_quantized_gradients`, its kernels stood in for", 1e-2),
}
OF_RANKS = ("AutoTP", "sequences cut", "AutoEP", "hpZ")
"""Settings that cut the ranks into groups: two of them need four ranks. So does AutoTP, where ZeRO is to shard."""
_MASTERS = "bf16.bf16_master_weights_and_grads = true is not supported with these settings"
_DEEPSPEEDS = "DeepSpeed does not take this config"
# (one, other) -> the stages where it is refused, all without a number, and what the line says.
REFUSED: Mapping[tuple[str, str], tuple[tuple[int, ...], str]] = {
    ("fp32 sums", "bf16 masters"): ((), f"{_MASTERS}: at stage 1 DeepSpeed keeps fp32 masters"),
    ("bf16 masters", "offload"): ((), f"{_MASTERS}: DeepSpeed offloads them for its own CPU Adam alone"),
    ("fp32 sums", "sequences cut"): ((), "measures gradients on the first rank of a sequence alone"),
    ("no reduce_scatter", "sequences cut"): ((3,), "divides gradients of parameters larger than reduce_bucket_size"),
    ("no reduce_scatter", "AutoEP"): ((1, 2), f"{_DEEPSPEEDS}: Reduce Scatter in ZeRO Stage 2 must be set to True"),
    ("no contiguous_gradients", "AutoEP"): ((1, 2), "sums those of different experts together; leave it true"),
    ("no reduce_scatter", "qgZ"): ((), f"{_DEEPSPEEDS}: when enable all_to_all_reduce, reduce_scatter should also"),
    ("autocast", "qwZ"): ((), f"{_DEEPSPEEDS}: Cannot enable both torch autocast and zero quantized weights"),
    ("zero.Init", "AutoTP"): ((), "AutoTP replaces parameters of a model that was made under deepspeed.zero.Init"),
    ("zero.Init", "sequences cut"): ((), "--zero-init beside sequence_parallel_size is not supported"),
    ("zero.Init", "AutoEP"): ((), "for a model that was made under deepspeed.zero.Init"),
    ("AutoTP", "sequences cut"): ((), "sequence_parallel_size is not supported beside tensor_parallel.autotp_size"),
    ("AutoTP", "AutoEP"): ((), "expert_parallel.enabled is not supported beside tensor_parallel.autotp_size"),
    ("AutoTP", "hpZ"): ((), "takes neighbours, which hold other shards, for the ranks that share its second copy"),
    ("AutoTP", "qgZ"): ((), "sums quantized gradients over all ranks, those that hold other shards too"),
    ("sequences cut", "AutoEP"): ((), "expert_parallel.enabled is not supported beside sequence_parallel_size"),
    ("AutoEP", "hpZ"): ((), f"{_DEEPSPEEDS}: AutoEP with ZeRO Stage 3 does not support hpZeRO"),
    ("AutoEP", "qgZ"): ((), f"{_DEEPSPEEDS}: AutoEP with ZeRO Stage 3 does not support zero_quantized_gradients"),
}
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two settings in a run. stage: of ZeRO. refused: what the line says that refuses it; None where it trains."""

    names: tuple[str, str]
    stage: int
    refused: str | None

    @property
    def ranks(self) -> int:
        two_kinds = all(name in OF_RANKS for name in self.names) and self.refused is None
        return 4 if "AutoTP" in self.names or two_kinds else 2

    @property
    def config(self) -> dict[str, Any]:
        """Both, section by section."""
        both: dict[str, Any] = {}
        for name in self.names:
            for key, value in _BY_NAME[PAIRED[name][0]].config.items():
                both[key] = {**both.get(key, {}), **value} if isinstance(value, Mapping) else value
        return both

    @property
    def flags(self) -> dict[str, Any]:
        """Of ``ds-optim train``."""
        return {key: value for name in self.names for key, value in (_BY_NAME[PAIRED[name][0]].flags or {}).items()}

    @property
    def rounding(self) -> float:
        """How far its losses may be from those of the run without the two, in nats."""
        return max(PAIRED[name][1] for name in self.names)


def _stages(name: str) -> tuple[int, ...]:
    # Master weights are ZeRO's: at stage 0 the row says so by itself.
    return (1, 2, 3) if name == "bf16 masters" else _BY_NAME[PAIRED[name][0]].stages


def _pairs() -> list[Pair]:
    """Each two where they train, at one of the stages that they have in common, by turns; and where they do not."""
    found: list[Pair] = []
    for number, names in enumerate(combinations(PAIRED, 2)):
        stages = [stage for stage in _stages(names[0]) if stage in _stages(names[1])]
        at, line = REFUSED.get(names, ((), ""))
        bad = [stage for stage in stages if names in REFUSED and (stage in at or not at)]
        good = [stage for stage in stages if stage not in bad]
        if good:
            found.append(Pair(names=names, stage=good[number % len(good)], refused=None))
        if bad:
            found.append(Pair(names=names, stage=bad[0], refused=line))
    return found


PAIRS = _pairs()
