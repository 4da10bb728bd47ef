"""The shape that a checkpoint is to have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.sharding.layout import MOST_RANKS, Layout, build_layout
from ds_optim.zero.auto import at
from ds_optim.zero.checkpoints.columns import Column
from ds_optim.zero.checkpoints.experts import LAYERS
from ds_optim.zero.checkpoints.portable import Portable

SETTINGS = ("stage", "sub_group_size", "parameter_alignment", "round_robin_gradients")
"""What a layout is cut by, under zero_optimization."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """ranks, stage: of the run that is to load it, and tensor: how many ranks have the shards of one of them. The rest:
    its settings of these names under zero_optimization, which stage 3 (sub_group_size) and stages 1 and 2 cut by."""

    ranks: int
    stage: int
    sub_group_size: int
    parameter_alignment: bool
    round_robin_gradients: bool = False
    tensor: int = 1

    @property
    def processes(self) -> int:
        """All ranks of the job."""
        return self.ranks * self.tensor

    def settings(self) -> dict[str, Any]:
        """The same under zero_optimization."""
        return {key: getattr(self, key) for key in SETTINGS}

    def layout(self, portable: Portable) -> Layout:
        groups = [group.params for group in portable.groups]
        dtype = portable.weights_dtype(portable.specs[0].name)
        return build_layout(
            groups,
            stage=self.stage,
            world_size=self.ranks,
            param_alignment=element_alignment(dtype) if self.parameter_alignment else 1,
            sub_group_size=self.sub_group_size,
            round_robin=self.round_robin_gradients,
            group_ranks=[len(portable.column.sharing(group.hyper, self.ranks)) for group in portable.groups],
        )


def element_alignment(dtype: torch.dtype) -> int:
    """Elements at which ``zero_optimization.parameter_alignment`` puts parameters: 16 bytes' worth."""
    return 16 // math.gcd(16, dtype.itemsize)


def choose_target(
    portable: Portable, ranks: int | None, stage: int | None, config: Mapping[str, Any] | None = None
) -> Target:
    """What flags say, then the new run's DeepSpeed JSON; without one, what the checkpoint's says.

    What a JSON leaves out is DeepSpeed's default, as it is for the run. ranks: all of the job.

    Raises:
        UserError: a number that is none, or a shape that this checkpoint cannot have.
    """
    given = {**_section(portable.config), "stage": portable.stage} if config is None else _section(config)
    if stage is not None or given.get("stage") == "auto":
        given["stage"] = portable.stage if stage is None else stage
    if given.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"--stage is {given['stage']}: write 0, 1, 2 or 3")
    zero = _parsed(given)
    count = portable.ranks * portable.column.tensor_ranks if ranks is None else ranks
    if not 1 <= count <= MOST_RANKS:
        raise UserError(f"--ranks is {count}: write a number of ranks from 1 to {MOST_RANKS:,}")
    _check_columns(portable.column, count, config)
    target = Target(
        ranks=count // portable.column.tensor_ranks,
        tensor=portable.column.tensor_ranks,
        stage=int(zero.stage),
        sub_group_size=zero.sub_group_size,
        parameter_alignment=zero.parameter_alignment,
        round_robin_gradients=zero.round_robin_gradients,
    )
    if target.stage == 0:
        _check_unsharded(portable)
    if target.stage == 3 and portable.column.experts and not isinstance(portable.models[0].get(LAYERS), list):
        raise UserError("DeepSpeed 0.19 does not train its MoE layers at stage 3: write --stage 2")
    return target


def _check_columns(column: Column, ranks: int, config: Mapping[str, Any] | None) -> None:
    """Refuse another number of columns, and of ranks in which they do not come out even."""
    what = "experts are dealt out to" if column.experts else "shards of parameters are on"
    if ranks % column.count:
        raise UserError(
            f"--ranks is {ranks}, and the {what} {column.count} ranks, which stay as many: write a multiple of "
            f"{column.count}"
        )
    setting = "expert_parallel.autoep_size" if column.experts else "tensor_parallel.autotp_size"
    asked = None if config is None else at(config, setting)
    if type(asked) is int and asked not in (0, column.count):
        raise UserError(f"{setting} is {asked}, and the checkpoint's {what} {column.count} ranks: write {column.count}")


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    section = config.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        raise UserError(f'zero_optimization is {section!r}: write {{"stage": 1}}')
    return dict(section)


def _parsed(section: Mapping[str, Any]) -> Any:
    """DeepSpeed's own reading of the settings that decide a layout."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        return DeepSpeedZeroConfig(**{key: section[key] for key in SETTINGS if key in section})
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"zero_optimization.{name} is {first['input']!r}: {first['msg']}") from None


def _check_unsharded(portable: Portable) -> None:
    """Refuse what a run without ZeRO cannot have."""
    scaler = portable.wrapper.get("loss_scaler")
    if portable.wrapper.get("dynamic_loss_scale") or getattr(scaler, "cur_scale", 1.0) != 1.0:
        raise UserError("a run in fp16 with a loss scale does not go to stage 0: write --stage 1")
    if portable.description is None and len(portable.groups) > 1:
        raise UserError(
            "a release of ds_optim wrote this checkpoint that does not name the parameters of its groups, which stage "
            "0 asks for: write --stage 1, or save it once more with this release"
        )
