"""DeepSpeed's pipeline engine: every stage has an optimizer of its own, over the ranks that hold the same layers.

What lies in one stage's partitions is compared among its ranks alone. All ranks of the pipeline hear of a problem, for
they wait for each other; and what no stage can know of another is compared here: random streams, schedules of steps,
and how the copies of a tied layer are stepped, which must stay the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_optim.errors import UserError
from ds_optim.optimizers.alike import check_alike, numbers_of
from ds_optim.optimizers.routing import in_stages, unmatched_in
from ds_optim.sharding.binding import Groups, Member, experts_of
from ds_optim.sharding.comm import Comm
from ds_optim.zero.auto import at
from ds_optim.zero.refused import SEQUENCE, above

_TIED = "tied_modules."
"""What the names of a ``TiedLayerSpec``'s parameters begin with, on every stage that has a copy."""
_OF_ALL = ("seed", "period", "period_mode")


def stage_of(model: Any) -> int | None:
    """The number of this rank's stage; None for any other model."""
    return int(model.stage_id) if in_stages(model) else None


def stages_of(model: Any) -> int:
    """In how many stages a model lies; 1 for a whole one."""
    return int(model.num_stages) if in_stages(model) else 1


def check_pipeline(model: Any, config: Mapping[str, Any], mpu: Any = None) -> None:
    """Refuse what the pipeline engine, or this package with it, cannot train.

    Args:
        mpu: of the call, which brings other parallelism along.

    Raises:
        UserError: with what to write instead.
    """
    if not in_stages(model):
        return
    stage = str(at(config, "zero_optimization.stage"))
    if stage in ("2", "3"):
        raise UserError(
            f"zero_optimization.stage is {stage} and the model a PipelineModule: DeepSpeed's pipeline engine trains at "
            "stages 0 and 1; use stage 1"
        )
    if stage != "1" and any(at(config, f"{section}.enabled") in (True, 1) for section in ("bf16", "bfloat16")):
        raise UserError(
            "bf16 at ZeRO stage 0 is not supported with a PipelineModule: DeepSpeed 0.19 cuts the optimizer's state "
            "among the ranks of a stage there and saves that of the first alone; use stage 1"
        )
    if any(experts_of(parameter) is not None for parameter in model.parameters()):
        raise UserError(
            "experts in groups of their own are not supported within a pipeline: pass the model as a plain module, or "
            "without deepspeed.moe.layer.MoE"
        )
    if mpu is not None or above(1)(config.get(SEQUENCE)):
        raise UserError(
            "an mpu, as of sequence parallelism, is not supported with a PipelineModule: DeepSpeed's pipeline engine "
            f"takes none; set {SEQUENCE} to 1 and pass no mpu, or pass the model as a plain module"
        )
    axes = model.topology()
    if "model" in axes.get_axis_names() and axes.get_dim("model") > 1:
        raise UserError(
            "tensor parallelism within a pipeline is not supported with ds_optim's optimizers: give the topology no "
            '"model" axis, or one of size 1'
        )


def check_folder(model: Any, folder: Path) -> None:
    """Refuse the checkpoint of a pipeline whose stages hold other layers.

    Raises:
        UserError: with what to do instead.
    """
    there = len(list(folder.glob("mp_rank_*_model_states.pt")))
    if there != stages_of(model):
        raise UserError(
            f"{folder} is of {_counted(there)} and this run has {_counted(stages_of(model))}: the optimizer's files "
            "hold the layers of a stage each, and ds_optim does not cut them anew; load it with as many stages"
        )


def _counted(stages: int) -> str:
    return f"{stages} stage{'s' if stages != 1 else ''}"


def all_ranks(engine: Any) -> Comm | None:
    """The ranks of all stages, where an engine is a pipeline's."""
    return Comm.of_group(dist.group.WORLD) if in_stages(getattr(engine, "module", None)) else None


def agree_across_stages(
    optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups, comm: Comm
) -> None:
    """Compare what stages must have alike; collective over all of them.

    Raises:
        UserError: on every rank, with what differs, the ranks and their values.
    """
    answers = comm.gather_objects(_meant(optimizer, members, groups))
    said = {what: value for answer in reversed(answers) for what, value in answer.items()}
    check_alike([{**said, **answer} for answer in answers])  # a stage without it has nothing to say


def _meant(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[Member]], groups: Groups) -> dict[str, str]:
    meant = {"optimizer": type(optimizer).__name__}
    for number, (group, own) in enumerate(zip(groups, members, strict=True)):
        where = f"of parameter group {group.get('name', number)!r}"
        meant |= {f"{key} {where}": repr(group[key]) for key in _OF_ALL if key in group}
        numbers = sorted(numbers_of([group]).items())
        tied = [member for member in own if member.spec.name.startswith(_TIED)]
        meant |= {f"rule and numbers of {m.spec.name}": repr((m.spec, m.view, numbers)) for m in tied}
    return meant


def tied_problem(members: Sequence[Sequence[Member]], momentum_dtype: str, comm: Comm) -> UserError | None:
    """Copies of a tied layer are cut at other borders on each stage, and int8 momentum has a scale for what lies
    between borders: the copies would come apart."""
    if momentum_dtype != "int8" or comm.world_size == 1:
        return None
    name = next((m.spec.name for own in members for m in own if m.spec.name.startswith(_TIED)), None)
    if name is None:
        return None
    return UserError(
        f'momentum_dtype "int8" is not supported for {name}, which stages share and cut differently: use "bfloat16"'
    )


def check_patterns(model: nn.Module, comm: Comm) -> None:
    """Refuse patterns of routing that matched nothing on any stage; collective over all of them.

    Raises:
        UserError: on every rank.
    """
    answers = comm.gather_objects(unmatched_in(model))
    for option, pattern in answers[0]:
        if all((option, pattern) in answer for answer in answers):
            raise UserError(
                f"{option}: the pattern {pattern!r} matches no parameter of any stage: correct it or leave it out"
            )


def first_other(digests: Sequence[tuple[int | None, str]]) -> tuple[int, int] | None:
    """Of (stage, digest) by rank: the first rank whose digest is not that of its stage's first rank, and that one."""
    firsts: dict[int | None, int] = {}
    for rank, (stage, digest) in enumerate(digests):
        first = firsts.setdefault(stage, rank)
        if digests[first][1] != digest:
            return rank, first
    return None
