"""Every optimizer at every ZeRO stage on the ranks of this machine, against the unsharded optimizer on its device.

The gradients are given, and their means over the ranks exact (see ``given``), so that what differs is the optimizer's,
its exchange's or the collectives' doing. State is compared with the estimate to the byte.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.accept.checks import AcceptSettings, Check, within
from ds_optim.accept.given import STEPS, Subject, distance, gradients, new_model, share_of, step_alone, subjects
from ds_optim.accept.kernels import limit_of
from ds_optim.bench import ranks as bench_ranks
from ds_optim.machine import ranks
from ds_optim.machine.child import reason_line
from ds_optim.machine.plugins import load_plugins
from ds_optim.memory import account
from ds_optim.memory.estimate import estimate
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.memory.estimate_terms import ZeroSettings

STAGES = (0, 1, 2, 3)
_MOMENTA = ("float32", "bfloat16")
_QUICK_STAGES, _QUICK = (1, 3), ("Lion", "LionMuon", "NorMuon", "StableLion")
_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
_BUCKET, _PERSISTENT = 20_000, 100
"""Elements: several buckets a step, and vectors that stay whole at stage 3."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one rank has to say of a run: how far its end is from the unsharded one, and bytes of state, by key.

    ``problem``: why there is nothing to say. The distance is rank 0's; the others know none.
    """

    problem: str | None = None
    apart: float = 0.0
    worst: str = ""
    state: dict[str, int] | None = None
    scalars: int = 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """So many ranks, and how they talk, at which stages. one_device: they share the first GPU, over gloo."""

    ranks: int
    backend: str
    one_device: bool = False
    stages: tuple[int, ...] = STAGES

    def __str__(self) -> str:
        return f"{self.ranks} ranks over {self.backend}" + (" on one GPU" if self.one_device else "")


def places(settings: AcceptSettings) -> list[Place]:
    """On several GPUs a rank each over NCCL; on one GPU NCCL alone, and two ranks over gloo; on a CPU gloo."""
    # Means are exact over powers of two.
    whole = 1 << (settings.ranks.bit_length() - 1)
    if settings.gpus == 0:
        return [Place(ranks=whole, backend="gloo")]
    if whole > 1:
        return [Place(ranks=whole, backend="nccl")]
    return [
        Place(ranks=1, backend="nccl", stages=(0, 3)),
        Place(ranks=2, backend="gloo", one_device=True),
    ]


def run(settings: AcceptSettings, folder: Path) -> Iterator[Check]:
    """A process group for each stage, in which one optimizer after the other trains."""
    load_plugins()
    chosen = [s for s in subjects(_MOMENTA[: 1 if settings.quick else 2]) if not settings.quick or s.name in _QUICK]
    asked = _QUICK_STAGES if settings.quick else STAGES
    cells = [(place, stage) for place in places(settings) for stage in place.stages if stage in asked]
    for place, stage in cells:
        try:
            by_rank: list[list[Trained]] = bench_ranks.run(
                place.ranks, train_all, stage, [(s.name, s.momentum_dtype) for s in chosen], one_device=place.one_device
            )
        except bench_ranks.RankFailedError as problem:
            yield Check(name="every optimizer", where=f"stage {stage}, {place}", ok=False, note=str(problem))
            continue
        for subject, trained in zip(chosen, zip(*by_rank, strict=True), strict=True):
            yield from _checks(subject, stage, place, trained, settings)


def _checks(
    subject: Subject, stage: int, place: Place, by_rank: Sequence[Trained], settings: AcceptSettings
) -> Iterator[Check]:
    where = f"stage {stage}, {subject.momentum_dtype} momentum, {place}"
    problem = next((trained.problem for trained in by_rank if trained.problem is not None), None)
    if problem is not None:
        yield Check(name=subject.name, where=where, ok=False, note=problem)
        return
    first = by_rank[0]
    note = first.worst if first.apart else ""
    yield within(subject.name, first.apart, limit_of(subject), where=where, unit="of the way", note=note)
    model = shape_of_module("given", new_model())
    plan = plan_optimizer(
        model,
        subject.type,
        subject.arguments,
        momentum_dtype=subject.momentum_dtype,
        weights=torch.float32,
        device=settings.device,
    )
    zero = ZeroSettings(
        stage=stage,
        ranks=place.ranks,
        dtype="fp32",
        accumulation=1,
        reduce_bucket_size=_BUCKET,
        prefetch_bucket_size=_BUCKET,
        param_persistence_threshold=_PERSISTENT,
        device=settings.device,
    )
    expected = estimate(model, plan, zero, transients=False).ranks
    wrong = 0
    for rank, found in zip(expected, by_rank, strict=True):
        kept = found.state or {}
        wrong += sum(abs(rank.state.get(key, 0) - kept.get(key, 0)) for key in {*rank.state, *kept})
        # Numbers that a rule keeps for each parameter are Python's, and no tensor's bytes.
        wrong += 0 if subject.rule.scalar else abs(rank.scalars - found.scalars)
    yield within("bytes of state", wrong, 0, where=f"{subject.name}, {where}", unit="bytes differ")


def train_all(rank: int, world_size: int, stage: int, asked: Sequence[tuple[str, str]]) -> list[Trained]:
    """On one rank of a group: train under each subject, by name and dtype of momentum."""
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    known = {(subject.name, subject.momentum_dtype): subject for subject in subjects(_MOMENTA)}
    done = []
    for key in asked:
        try:
            done.append(ranks.together(partial(_train, known[key], stage, rank, world_size)))
        except Exception as problem:
            done.append(Trained(problem=reason_line(problem)))
    return done


def _train(subject: Subject, stage: int, rank: int, world_size: int) -> Trained:
    import ds_optim

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "optimizer": {"type": subject.type, "params": subject.arguments},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": _PERSISTENT,
            **dict.fromkeys(_BUCKETS, _BUCKET),
        },
    }
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = ds_optim.initialize(model=new_model().to(ranks.device()), config=config)
    share = share_of(rank, world_size)
    for step in range(STEPS):
        own = {name: share * g for name, g in gradients(step, ranks.device()).items()}
        engine.backward(engine(own))
        if step == STEPS - 1:
            held = account(engine)
        engine.step()
    weights = _whole_weights(engine)
    engine.destroy()
    state, scalars = dict(held.state), held.scalars
    if rank:
        return Trained(state=state, scalars=scalars)
    apart, worst = distance(weights, step_alone(subject, ranks.device()))
    return Trained(apart=apart, worst=worst, state=state, scalars=scalars)


def _whole_weights(engine: Any) -> dict[str, Tensor]:
    """The model's weights, on the CPU: fp32 at every stage, so that they are the optimizer's own. Collective."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().cpu().clone() for name, p in named.items()}
