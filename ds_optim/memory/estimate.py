"""What training takes, in closed form: bytes by rank of everything that a model, an optimizer and ZeRO will hold.

No weights, no GPU, no process group: the layout of ``ds_optim.sharding.layout`` says to the element what every rank
holds, DeepSpeed 0.19.8's buffers follow from its settings, and an exchange's scratch from its plan. What forward and
backward hold comes from ``estimate_passes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ds_optim.elementwise import fused
from ds_optim.memory.estimate_exchange import exchange_plans, sampled_ranks
from ds_optim.memory.estimate_files import gradient_files, in_files, pinned, stored_numel
from ds_optim.memory.estimate_model import ModelShape, Parameter, numel_of
from ds_optim.memory.estimate_optimizers import GroupPlan, OptimizerPlan
from ds_optim.memory.estimate_terms import (
    ZeroSettings,
    accumulating,
    buckets,
    chunk_scratch,
    collected,
    early_buckets,
    gradients,
    place_in,
    rows,
    share_of,
    step_gradients,
    whole_gradients,
)
from ds_optim.memory.passes import Backward
from ds_optim.memory.rank import RankMemory
from ds_optim.optimizers.rules import SCALES_OF_MOMENTUM
from ds_optim.sharding.held import peak_scratch
from ds_optim.sharding.layout import Layout, Unit, build_layout

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """An estimate for all ranks of a run, and what it is of."""

    model: ModelShape
    optimizer: OptimizerPlan
    zero: ZeroSettings
    ranks: tuple[RankMemory, ...] = field(repr=False)
    largest_layer: int = 0
    """Bytes of the largest layer, gathered."""

    @property
    def largest(self) -> RankMemory:
        """The rank that needs most; of equal ones the last, whose gradients come first."""
        return max(reversed(self.ranks), key=lambda rank: (rank.peak(), rank.most_model_states))

    def host_of_node(self, ranks: int) -> int:
        """Bytes that the ranks of a node keep in its memory, of the node that needs most; ``ranks``: of a node."""
        held = [rank.on_host for rank in self.ranks]
        return max(sum(held[first : first + ranks]) for first in range(0, len(held), ranks))

    def total(self, term: str) -> int:
        """A term's sum over the ranks, by its name in :class:`RankMemory`; ``state`` is summed over its buffers."""
        name = "optimizer_state" if term == "state" else term
        return sum(getattr(rank, name) for rank in self.ranks)


def layout_of(plan: OptimizerPlan, zero: ZeroSettings) -> Layout:
    """Where the elements of the plan's groups will lie."""
    return build_layout(
        [[parameter.spec for parameter in group.parameters] for group in plan.groups],
        stage=zero.stage,
        world_size=zero.ranks,
        param_alignment=zero.param_alignment,
        sub_group_size=zero.sub_group_size,
        group_ranks=[max(1, zero.ranks // group.over) for group in plan.groups],
        round_robin=zero.round_robin,
    )


def estimate(
    model: ModelShape, optimizer: OptimizerPlan, zero: ZeroSettings, *, transients: bool = True
) -> MemoryEstimate:
    """What every rank will hold.

    Args:
        transients: work out the scratch of exchanges too, which takes the longest.
    """
    units = layout_of(optimizer, zero).units
    plans = [optimizer.groups[unit.group] for unit in units]
    scratch = _exchanges(optimizer, zero, units) if transients else {}
    count = 1 if zero.stage == 0 else zero.ranks
    ranks = [_rank(rank, model, optimizer, zero, units, plans, scratch) for rank in range(count)]
    return MemoryEstimate(
        model=model,
        optimizer=optimizer,
        zero=zero,
        ranks=tuple(ranks * zero.ranks if zero.stage == 0 else ranks),
        largest_layer=model.largest_layer * zero.itemsize,
    )


@dataclass
class _Kept:
    """Bytes of what a rank keeps for units, summed over them; extra_gradients, staging: of DeepSpeed's Muon."""

    state: dict[str, int] = field(default_factory=dict)
    padding: int = 0
    scalars: int = 0
    extra_gradients: int = 0
    staging: int = 0
    files: int = 0

    def add(self, key: str, amount: int) -> None:
        self.state[key] = self.state.get(key, 0) + amount


def _keep(kept: _Kept, unit: Unit, plan: GroupPlan, optimizer: OptimizerPlan, zero: ZeroSettings, rank: int) -> None:
    """Add what a rank keeps for one unit."""
    share = share_of(unit, rank, zero)
    partition = stored_numel(unit, zero)
    filed = in_files(unit, zero)
    kept.files += partition * zero.master_itemsize if filed else 0
    for key, itemsize in plan.buffers.items():
        swaps = filed and itemsize == zero.master_itemsize  # others stay in memory
        numel = partition if swaps else unit.partition_numel
        kept.files += numel * itemsize if swaps else 0
        if plan.whole and zero.stage in (1, 2):
            numel = share.touched
        if zero.bf16_masters and not optimizer.ours:
            itemsize = min(itemsize, zero.master_itemsize)  # others keep state in the dtype of what they step
        kept.add(key, numel * itemsize)
        kept.padding += 0 if plan.whole else (numel - share.held) * itemsize
        if plan.whole and zero.stage in (1, 2):  # DeepSpeed's Muon: a copy until the step is known to be sound,
            kept.staging += numel * itemsize
            kept.extra_gradients += numel * itemsize  # and updates beside the gradients that they were made from
    if plan.int8:
        kept.add(SCALES_OF_MOMENTUM, share.blocks * _FP32)
    columns = tuple(plan.views[spec.name].columns for spec in unit.params) if plan.rows else ()
    for key in plan.rows:
        kept.add(key, rows(unit, columns)[place_in(unit, rank, zero)] * _FP32)
    kept.padding += (partition - share.held) * zero.master_itemsize if zero.stage else 0
    kept.scalars += plan.scalar * len(unit.params)
    kept.scalars += optimizer.step_scalar * (len(unit.params) if unit.cut == "none" else 1)


def _rank(
    rank: int,
    model: ModelShape,
    optimizer: OptimizerPlan,
    zero: ZeroSettings,
    units: tuple[Unit, ...],
    plans: list[GroupPlan],
    scratch: Mapping[int, int],
) -> RankMemory:
    kept = _Kept()
    for unit, plan in zip(units, plans, strict=True):
        _keep(kept, unit, plan, optimizer, zero, rank)
    stored = sum(stored_numel(unit, zero) for unit in units)
    master = 0 if zero.stage == 0 and zero.dtype == "fp32" else stored * zero.master_itemsize
    before_step = gradients(units, rank, zero) + kept.extra_gradients
    on_device, on_host = buckets(units, zero)
    added = collected(units, rank, zero)
    nearest = max((sampled for sampled in scratch if sampled <= rank), default=0)
    narrow = optimizer.momentum_dtype != "float32" and optimizer.ours
    files = kept.files + gradient_files(units, rank, zero)
    return RankMemory(
        weights=_weights(model, zero, units),
        gradients=before_step,
        accumulating=accumulating(units, before_step, zero),
        master=master,
        state=kept.state,
        scalars=kept.scalars,
        padding=kept.padding,
        buckets=on_device + added + kept.staging,
        gathered=_gathered(model, zero),
        step_gradients=step_gradients(units, zero),
        exchange=scratch.get(nearest, 0),
        chunks=chunk_scratch(
            units, zero, stored=narrow, kept=2 * optimizer.cautious, kernels=optimizer.kernels and fused.asked_for()
        )
        if optimizer.ours and not zero.offload
        else 0,
        host=master + before_step + sum(kept.state.values()) - files if zero.offload else 0,
        host_buckets=on_host + pinned(units, zero),
        files=files,
        persistent_buckets=zero.stage == 3,
        backward=_backward(rank, model, units, zero, before_step, added, on_device + kept.staging),
    )


def _backward(
    rank: int,
    model: ModelShape,
    units: tuple[Unit, ...],
    zero: ZeroSettings,
    before_step: int,
    added: int,
    on_device: int,
) -> Backward:
    """What a rank holds in the last micro-batch's backward, of ``before_step`` bytes of gradients at its end."""
    waiting, whole = accumulating(units, before_step, zero), whole_gradients(units, zero)
    before, more = before_step + waiting, added
    if zero.accumulation == 1 and zero.stage < 3:
        before, more = 0, max(before_step, whole)
    if zero.offload:  # what is sharded goes to the host as it is reduced
        before, more = waiting, whole if zero.accumulation == 1 else 0
    cut = zero.stage == 2  # the last rank's partition holds the model's end
    return Backward(
        gradients=before,
        more_gradients=more,
        first=1 - (rank + 1) / zero.ranks if cut else 0.0,
        last=1 - rank / zero.ranks if cut else 1.0,
        buckets=on_device,
        early_buckets=early_buckets(zero),
        reduced_last=zero.stage == 0,
        gathered=_gathered(model, zero),
        whole=_whole(model, zero),
        ahead=_ahead(model, zero),
    )


def _weights(model: ModelShape, zero: ZeroSettings, units: Sequence[Unit]) -> int:
    frozen = numel_of(model.frozen)
    partitions = sum(unit.partition_numel for unit in units)
    if zero.stage == 3:
        frozen = sum(-(-parameter.numel // zero.ranks) for parameter in model.frozen)
        elements = partitions + frozen + _persistent(model, zero) + _secondary(model, zero)
    else:
        elements = sum(unit.partition_numel * unit.world_size for unit in units) + frozen
    return elements * zero.itemsize + model.buffer_bytes


def _persistent(model: ModelShape, zero: ZeroSettings) -> int:
    """Elements of the small parameters that stage 3 leaves gathered, each padded to a multiple of the ranks."""
    total = held = 0
    for parameter in model.parameters:
        fits = total + parameter.numel <= zero.model_persistence_threshold
        if fits and parameter.numel <= zero.param_persistence_threshold:
            total += parameter.numel
            held += _padded(parameter, zero)
    return held


def _secondary(model: ModelShape, zero: ZeroSettings) -> int:
    """Elements of a rank's shards of the second copy that hpZ keeps of all that is not left gathered."""
    if zero.hpz <= 1:
        return 0
    whole = sum(_padded(parameter, zero) for parameter in model.parameters)
    return (whole - _persistent(model, zero)) // min(zero.hpz, zero.ranks)


def _padded(parameter: Parameter, zero: ZeroSettings) -> int:
    ranks = max(1, zero.ranks // parameter.over)
    return -(-parameter.numel // ranks) * ranks


def _gathered(model: ModelShape, zero: ZeroSettings) -> int:
    """Bytes of parameters that stage 3 holds whole at the turn from forward to backward.

    A layer stays gathered if it is used again within ``max_reuse_distance`` elements, there and back; besides, the
    layer in work and what is fetched ahead of it.
    """
    kept = min(zero.max_reuse_distance // 2, zero.max_live_parameters) * zero.itemsize
    return min(_whole(model, zero), kept + _ahead(model, zero))


def _whole(model: ModelShape, zero: ZeroSettings) -> int:
    """Bytes of all parameters that stage 3 gathers."""
    if zero.stage != 3:
        return 0
    small = numel_of(p for p in model.parameters if p.numel <= zero.param_persistence_threshold)
    return max(0, model.numel - small) * zero.itemsize


def _ahead(model: ModelShape, zero: ZeroSettings) -> int:
    """Bytes of the layer in work, and of what is fetched before it is met."""
    if zero.stage != 3:
        return 0
    return (model.largest_layer + min(zero.prefetch_bucket_size, zero.max_live_parameters)) * zero.itemsize


def _exchanges(optimizer: OptimizerPlan, zero: ZeroSettings, units: tuple[Unit, ...]) -> dict[int, int]:
    """By rank, the largest scratch among the units' exchanges, which run one after another."""
    most: dict[int, int] = {}
    for plan in exchange_plans(units, optimizer, zero):
        for rank in sampled_ranks(plan.unit.world_size):
            of_all = rank * zero.ranks // plan.unit.world_size if zero.stage else rank
            most[of_all] = max(most.get(of_all, 0), peak_scratch(plan, rank, offloaded=zero.offload))
    return most
