"""The shape that a checkpoint is to have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.sharding.layout import Layout, build_layout
from ds_optim.zero.checkpoints.portable import Portable

_SUB_GROUP = 1_000_000_000  # DeepSpeed's default


@dataclass(frozen=True, kw_only=True)
class Target:
    """ranks, stage: of the run that is to load it. sub_group_size, parameter_alignment: its settings of these names
    under zero_optimization, which stages 3 and 1, 2 cut by."""

    ranks: int
    stage: int
    sub_group_size: int = _SUB_GROUP
    parameter_alignment: bool = False

    def layout(self, portable: Portable) -> Layout:
        groups = [group.params for group in portable.groups]
        first = portable.models[0]["module"][portable.specs[0].name]
        return build_layout(
            groups,
            stage=self.stage,
            world_size=self.ranks,
            param_alignment=element_alignment(first.dtype) if self.parameter_alignment else 1,
            sub_group_size=self.sub_group_size,
        )


def element_alignment(dtype: torch.dtype) -> int:
    """Elements at which ``zero_optimization.parameter_alignment`` puts parameters: 16 bytes' worth."""
    return 16 // math.gcd(16, dtype.itemsize)


def choose_target(
    portable: Portable, ranks: int | None, stage: int | None, config: Mapping[str, Any] | None = None
) -> Target:
    """What flags say, then what the new run's DeepSpeed JSON says, then what the checkpoint's says.

    Raises:
        UserError: a number that is none.
    """
    zero: dict[str, Any] = {}
    for given in (portable.config, {"zero_optimization": {"stage": portable.stage}}, config or {}):
        section = given.get("zero_optimization")
        if isinstance(section, Mapping):
            zero |= {key: value for key, value in section.items() if value is not None and value != "auto"}
    stage = zero["stage"] if stage is None else stage
    ranks = portable.ranks if ranks is None else ranks
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--stage is {stage}: write 0, 1, 2 or 3")
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}: write a number of ranks from 1")
    if stage == 0 and portable.wrapper.get("dynamic_loss_scale"):
        raise UserError("a run in fp16 with a dynamic loss scale does not go to stage 0: write --stage 1")
    if stage == 0 and portable.description is None and len(portable.groups) > 1:
        raise UserError(
            "a release of ds_optim wrote this checkpoint that does not name the parameters of its groups, which stage "
            "0 asks for: write --stage 1, or save it once more with this release"
        )
    size = zero.get("sub_group_size", _SUB_GROUP)
    return Target(
        ranks=ranks,
        stage=stage,
        sub_group_size=int(float(size)),
        parameter_alignment=bool(zero.get("parameter_alignment", False)),
    )
