"""``ds-optim estimate``: every optimizer, momentum dtype, stage and number of ranks, side by side with AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ds_optim.errors import UserError
from ds_optim.memory.estimate import MemoryEstimate, estimate
from ds_optim.memory.estimate_fit import USABLE, fewest_ranks, largest_micro_batch
from ds_optim.memory.estimate_model import ModelShape
from ds_optim.memory.estimate_optimizers import OptimizerPlan, plan_optimizer, takes_momentum_dtype
from ds_optim.memory.estimate_passes import Batch, ModelPasses
from ds_optim.memory.estimate_terms import TORCH_DTYPES, ZeroSettings
from ds_optim.memory.passes import Passes
from ds_optim.optimizers.checks import check_choice

BASELINE = "adamw"
_PARALLEL = {"tensor": "--tensor-parallel", "experts": "--expert-parallel"}
#: Terms of a row, in the order of the table.
TERMS = (
    *("weights", "gradients", "accumulating", "master", "optimizer_state", "scalars", "padding", "buckets"),
    *(
        "gathered",
        "step_gradients",
        "exchange",
        "chunks",
        "host",
        "host_buckets",
        "files",
        "model_states",
        "most_model_states",
    ),
)


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """What is to be estimated; ``zero`` gives all settings but stage and ranks.

    gpu_bytes: of an accelerator, for what fits. seq_len, micro_batch, checkpointing, attention, loss_chunks,
    liger_loss: see ``Batch``. ranks: of all, those of a tensor-parallel group too; of a node at most ``node_ranks``.
    tensor, experts: over how many AutoTP cuts the model, and AutoEP deals out its experts. unused: keys of a DeepSpeed
    JSON that change nothing in this model.
    """

    model: ModelShape
    optimizers: tuple[str, ...]
    momentum_dtypes: tuple[str, ...] = ("float32",)
    stages: tuple[int, ...] = (0, 1, 2, 3)
    ranks: tuple[int, ...] = (8,)
    zero: ZeroSettings = field(default_factory=lambda: ZeroSettings(stage=0, ranks=1))
    optimizer_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gpu_bytes: int | None = None
    micro_batch: int = 1
    seq_len: int = 1024
    checkpointing: bool = False
    attention: str = "sdpa"
    loss_chunks: int = 1
    liger_loss: bool = False
    tensor: int = 1
    experts: int = 1
    node_ranks: int = 8
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.micro_batch, self.seq_len, self.loss_chunks) < 1:
            raise UserError("micro-batch, seq-len and loss-chunks are whole numbers from 1")
        if self.liger_loss and self.loss_chunks > 1:
            raise UserError("liger-loss has pieces of its own: take it or loss-chunks out")
        check_choice("attention", self.attention, ("sdpa", "eager"))
        for name in ("tensor", "experts"):
            size = getattr(self, name)
            if size < 1 or any(ranks % size for ranks in self.ranks):
                ranks = ", ".join(map(str, self.ranks))
                raise UserError(f"{_PARALLEL[name]} is {size}, and the ranks are {ranks}: write multiples of it")
        for name in self.optimizer_params:
            if name not in self.optimizers:
                raise UserError(f"optimizer_params names {name!r}, which is not estimated: add it to --optimizers")
            if not isinstance(self.optimizer_params[name], Mapping):
                raise UserError(f'optimizer_params of {name!r} are no JSON object such as {{"lr": 0.001}}')

    @cached_property
    def held(self) -> ModelShape:
        """What one rank holds of the model before ZeRO cuts it."""
        return self.model.for_ranks(self.tensor, self.experts)

    @cached_property
    def passes(self) -> ModelPasses:
        """Forward and backward of the model, for any number of sequences at once."""
        batch = Batch(
            micro_batch=self.micro_batch,
            seq_len=self.seq_len,
            dtype=self.zero.dtype,
            checkpointing=self.checkpointing,
            attention=self.attention,
            loss_chunks=self.loss_chunks,
            liger_loss=self.liger_loss,
            device=self.zero.device,
        )
        return ModelPasses(self.model, batch)

    @property
    def has_passes(self) -> bool:
        """Whether anything is known of them: not where the model is only a list of parameters."""
        return bool(self.passes.own.moments)

    def plans(self) -> Iterator[OptimizerPlan]:
        """Every optimizer at every momentum dtype that it can have; those that can have none, once."""
        for name in self.optimizers:
            for dtype in self.momentum_dtypes if takes_momentum_dtype(name) else ("float32",):
                yield self.plan(name, dtype)

    def plan(self, name: str, momentum_dtype: str = "float32") -> OptimizerPlan:
        return plan_optimizer(
            self.held,
            name,
            self.optimizer_params.get(name),
            momentum_dtype=momentum_dtype,
            weights=TORCH_DTYPES[self.zero.dtype],
            device=self.zero.device,
        )

    def at(self, stage: int, ranks: int) -> ZeroSettings:
        """The settings of a stage and a number of ranks; stage 0 has neither offload nor bf16 master weights, and NVMe
        is for stage 3."""
        sharded = stage > 0
        return replace(
            self.zero,
            stage=stage,
            ranks=ranks // self.tensor,
            offload=self.zero.offload and sharded and (stage == 3 or not self.zero.nvme),
            nvme=self.zero.nvme and stage == 3,
            bf16_masters=self.zero.bf16_masters and sharded,
        )

    def baseline_at(self, stage: int, ranks: int) -> ZeroSettings:
        """The same for AdamW with fp32 master weights: in bf16 it rounds small updates away."""
        return replace(self.at(stage, ranks), bf16_masters=False)


@dataclass(frozen=True, kw_only=True)
class EstimateRow:
    """One estimate, AdamW's at the same stage and ranks, and what fits."""

    request: EstimateRequest
    estimate: MemoryEstimate
    baseline: MemoryEstimate

    @property
    def ranks(self) -> int:
        """Of all."""
        return self.estimate.zero.ranks * self.request.tensor

    @property
    def passes(self) -> Passes:
        return self.request.passes.own

    @property
    def host_of_node(self) -> int:
        """Bytes in the memory of a node, of as many ranks as one has."""
        asked = self.request
        sharded = max(1, asked.node_ranks // asked.tensor)  # of those that a tensor-parallel group is for ZeRO
        return self.estimate.host_of_node(sharded) * min(asked.tensor, asked.node_ranks)

    @property
    def peak(self) -> int:
        return self.estimate.largest.peak(self.passes)

    @cached_property
    def at_peak(self) -> Mapping[str, int]:
        """The peak by owner."""
        return self.estimate.largest.at_peak(self.passes)

    @cached_property
    def saving(self) -> dict[str, float]:
        """Percent less than AdamW: of optimizer state, of model states, and of the accelerator's peak."""
        own, base = self.estimate.largest, self.baseline.largest
        pairs = {
            "optimizer_state": (own.optimizer_state, base.optimizer_state),
            "model_states": (own.most_model_states, base.most_model_states),
            "all": (own.peak(self.passes), base.peak(self.passes)),
        }
        return {name: 100 * (1 - mine / theirs) for name, (mine, theirs) in pairs.items()}

    @cached_property
    def largest_batch(self) -> int | None:
        """The largest micro-batch on an accelerator of the given size; None where that is not asked or known."""
        if self.request.gpu_bytes is None or not self.request.has_passes:
            return None
        return largest_micro_batch(self.estimate.largest, self.request.gpu_bytes, self.request.passes.at)

    @cached_property
    def fewest(self) -> int | None:
        """The fewest accelerators of the given size at this stage; None where there are not enough, or none asked."""
        if self.request.gpu_bytes is None:
            return None
        own = self.estimate

        def memory_at(ranks: int) -> Any:
            settings = replace(own.zero, ranks=ranks)
            return estimate(own.model, own.optimizer, settings, transients=False).largest

        found = fewest_ranks(memory_at, self.request.gpu_bytes, self.passes)
        return None if found is None else max(found, self.request.experts) * self.request.tensor

    def record(self) -> dict[str, Any]:
        """The row as JSON, sizes in bytes."""
        largest = self.estimate.largest
        return {
            "model": self.estimate.model.name,
            "parameters": self.request.model.numel,
            "counted": self.estimate.model.counted,
            "optimizer": self.estimate.optimizer.name,
            "momentum_dtype": self.estimate.optimizer.momentum_dtype,
            **{key: value for key, value in asdict(self.estimate.zero).items() if key != "device"},
            "ranks": self.ranks,
            "tensor_parallel": self.request.tensor,
            "expert_parallel": self.request.experts,
            "per_rank": {term: getattr(largest, term) for term in TERMS},
            "sum_over_ranks": {term: self.estimate.total(term) for term in TERMS},
            "node_ranks": self.request.node_ranks,
            "host_of_node": self.host_of_node,
            "state": dict(largest.state),
            "largest_layer": self.estimate.largest_layer,
            "activations": self.passes.kept,
            "activations_are": self.passes.how,
            "peak": self.peak,
            "at_peak": dict(self.at_peak),
            "peak_may_be_short_by": self.passes.short,
            "saving_percent_of_adamw": self.saving,
            "largest_micro_batch": self.largest_batch,
            "fewest_gpus": self.fewest,
            "usable_share_of_gpu": USABLE,
        }


def estimate_rows(request: EstimateRequest) -> list[EstimateRow]:
    """Every row, by ranks, then stage, then optimizer."""
    plans = list(request.plans())
    baseline = request.plan(BASELINE)
    rows = []
    for ranks in request.ranks:
        for stage in request.stages:
            settings = request.at(stage, ranks)
            usual = request.baseline_at(stage, ranks)
            base = estimate(request.held, baseline, usual)
            for plan in plans:
                same = plan == baseline and settings == usual
                own = base if same else estimate(request.held, plan, settings)
                rows.append(EstimateRow(request=request, estimate=own, baseline=base))
    return rows
