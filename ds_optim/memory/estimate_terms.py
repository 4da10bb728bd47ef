"""The terms of an estimate that follow from a layout and DeepSpeed's settings: shares of ranks, gradients, buckets.

What DeepSpeed holds is that of 0.19.8, read in its source and counted on its engines by ``ds_optim.memory.account``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ds_optim.elementwise import native
from ds_optim.elementwise.chunks import CPU_CHUNK, CUDA_CHUNK, CUDA_SCRATCH, CUDA_SCRATCH_ELEMENT
from ds_optim.elementwise.momentum import scales_numel
from ds_optim.errors import UserError
from ds_optim.matrix.views import row_range
from ds_optim.sharding.layout import MOST_RANKS, Unit

WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FP32 = 4
_LAUNCHED, _MEASURED = 512, 256
"""Of launches: bytes a slice and one more, of two tables at most; and elements for each byte of their numbers."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """How a model is trained; sizes are in elements, as in DeepSpeed's JSON and with its defaults.

    Attributes:
        accumulation: micro-batches a step. The default stands for "several": then stage 1 holds whole gradients.
        grad_accum_dtype: ``data_types.grad_accum_dtype``; None for the model's dtype.
        offload: ``offload_optimizer`` to the CPU.
        nvme: to files, which is at stage 3 alone, with ``offload``. swap_buffers: its ``buffer_count``.
        overlap_comm: None for DeepSpeed's default, which is true at stage 3.
        bf16_masters: ``bf16_master_weights_and_grads`` with ``bf16_optimizer_states``.
        autocast: ``torch_autocast`` over fp32 weights, of which linear layers' gradients travel in its dtype.
        hpz: ``zero_hpz_partition_size``, ranks that keep a second copy of the weights from forward to step at stage 3.
        device: where matrices are worked on, "cuda" or "cpu".
    """

    stage: int
    ranks: int
    dtype: str = "bf16"
    offload: bool = False
    nvme: bool = False
    swap_buffers: int = 4
    accumulation: int = 2
    grad_accum_dtype: str | None = None
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    max_reuse_distance: int = 1_000_000_000
    max_live_parameters: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    param_alignment: int = 1
    round_robin: bool = False
    bf16_masters: bool = False
    autocast: bool = False
    hpz: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"there is no ZeRO stage {self.stage}; write 0, 1, 2 or 3")
        for key in ("ranks", "accumulation"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise UserError(f"{key} is {value!r}: write a whole number from 1")
        if self.ranks > MOST_RANKS:
            raise UserError(f"ranks is {self.ranks}: write at most {MOST_RANKS:,}")
        for key in ("dtype", "grad_accum_dtype"):
            value = getattr(self, key)
            if value not in WEIGHT_BYTES and (key == "dtype" or value is not None):
                raise UserError(f"{key} is {value!r}: write {', '.join(WEIGHT_BYTES)}")
        if self.offload and self.stage == 0:
            raise UserError("the optimizer is offloaded at stages 1 to 3 only: take offload out or raise the stage")
        if self.nvme and not (self.offload and self.stage == 3):
            raise UserError("state is offloaded to NVMe at stage 3 only: take nvme out or write stage 3")
        if self.bf16_masters:
            self._check_bf16_masters()

    def _check_bf16_masters(self) -> None:
        if self.dtype != "bf16":
            raise UserError(f"bf16 master weights go with dtype bf16, not {self.dtype}: change one of them")
        if self.stage == 0:
            raise UserError("bf16 master weights are for stages 1 to 3: take them out or raise the stage")
        if self.offload:
            raise UserError("bf16 master weights are not supported with offload: take one of the two out")
        if self.stage == 1 and self.grad_accum_dtype == "fp32":
            raise UserError("at stage 1 fp32 gradients make DeepSpeed keep fp32 masters: use stage 2 or bf16 gradients")

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return WEIGHT_BYTES[self.dtype]

    @property
    def master_itemsize(self) -> int:
        """Bytes of a master weight, and of the gradient that a step is given."""
        return WEIGHT_BYTES["bf16"] if self.bf16_masters else _FP32

    @property
    def grad_itemsize(self) -> int:
        """Bytes of an accumulated gradient."""
        return WEIGHT_BYTES[self.grad_accum_dtype or self.dtype]

    @property
    def overlaps(self) -> bool:
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm


@dataclass(frozen=True)
class Share:
    """One rank's part of a unit, in elements.

    held: of parameters. touched: of the whole parameters of which it holds a slice. blocks: of int8 momentum.
    """

    held: int
    touched: int
    blocks: int


@lru_cache(maxsize=256)
def shares(unit: Unit) -> tuple[Share, ...]:
    """The share of every rank."""
    held, touched, blocks = ([0] * unit.world_size for _ in range(3))
    for param, spec in enumerate(unit.params):
        for rank, piece in unit.holders(param):
            held[rank] += piece.numel
            touched[rank] += spec.numel
            blocks[rank] += scales_numel(piece.start, piece.numel)
    return tuple(Share(*numbers) for numbers in zip(held, touched, blocks, strict=True))


def share_of(unit: Unit, rank: int, zero: ZeroSettings) -> Share:
    """The share of a rank of all; experts' units have fewer, of which neighbours hold others."""
    return shares(unit)[place_in(unit, rank, zero)]


def place_in(unit: Unit, rank: int, zero: ZeroSettings) -> int:
    """The number of a rank of all among those that share the unit."""
    return rank * unit.world_size // zero.ranks if zero.stage else 0


@lru_cache(maxsize=256)
def rows(unit: Unit, columns: tuple[int, ...]) -> tuple[int, ...]:
    """Of how many rows every rank keeps values; columns: of the matrices of each parameter."""
    found = [0] * unit.world_size
    for param, each in enumerate(columns):
        for rank, piece in unit.holders(param):
            first, last = row_range(each, piece.start, piece.numel)
            found[rank] += last - first
    return tuple(found)


def gradients(units: Sequence[Unit], rank: int, zero: ZeroSettings) -> int:
    """Bytes of gradients that a rank holds before the optimizer's step, padding included.

    Stages 1 and 2 cut nothing: a parameter of which the rank holds a slice keeps its whole gradient. With fp32
    accumulation under bf16, stage 1 (``BF16_Optimizer``) holds all gradients in both.
    """
    if zero.stage == 0:
        return sum(unit.partition_numel for unit in units) * zero.itemsize
    partitions = sum(unit.partition_numel for unit in units)
    if zero.stage == 3:
        return partitions * (zero.grad_itemsize + (_FP32 if zero.offload else 0))
    if zero.offload:  # stage 2 adds micro-batches up on the host, in the model's dtype
        summed = zero.stage == 2 and zero.accumulation > 1
        return partitions * _FP32 + summed * zero.itemsize * sum(share_of(unit, rank, zero).touched for unit in units)
    if zero.grad_itemsize == zero.itemsize:
        mine = [share_of(unit, rank, zero) for unit in units]
        padding = partitions - sum(share.held for share in mine)
        return (sum(share.touched for share in mine) + padding) * zero.itemsize
    if zero.stage == 1:
        whole = sum(spec.numel for unit in units for spec in unit.params)
        padded = sum(unit.partition_numel * unit.world_size for unit in units)
        return padded * zero.grad_itemsize + whole * zero.itemsize
    return partitions * zero.grad_itemsize


def accumulating(units: Sequence[Unit], before_step: int, zero: ZeroSettings) -> int:
    """Bytes of gradients held between the micro-batches of a step beyond those before the optimizer's step, on the
    accelerator; with offload all of them, as those of the step lie on the host."""
    if zero.accumulation == 1 or zero.stage != 1:
        return 0
    whole = sum(spec.numel for unit in units for spec in unit.params) * zero.grad_itemsize
    return whole if zero.offload else max(0, whole - before_step)


def buckets(units: Sequence[Unit], zero: ZeroSettings) -> tuple[int, int]:
    """Bytes of DeepSpeed's communication buckets: (on the accelerator, on the host).

    Made anew by each backward at stages 1 and 2, kept for good at stage 3; as large as ``reduce_bucket_size`` says
    whatever the model's size. Two under ``overlap_comm`` at stages 1 and 2. Under autocast as many for each dtype on
    the wire.
    """
    whole = sum(spec.numel for unit in units for spec in unit.params)
    partitions = sum(unit.partition_numel for unit in units)
    largest = max((spec.numel for unit in units for spec in unit.params), default=0)
    filled = min(zero.reduce_bucket_size, whole)
    if zero.stage == 0:
        return filled * zero.itemsize, 0
    bucket = zero.reduce_bucket_size * zero.itemsize
    if zero.stage == 3:  # beside the bucket, what a reduce-scatter copies from it, padded by rank
        bucket += zero.reduce_bucket_size * WEIGHT_BYTES["bf16"] * zero.autocast
        return (bucket if zero.contiguous_gradients else 0) + filled * zero.itemsize, 0
    if not zero.contiguous_gradients and not zero.offload:
        return filled * zero.itemsize, 0
    on_device = bucket * (2 if zero.overlaps else 1) * (2 if zero.autocast else 1)
    if zero.offload:  # a staging copy of the largest gradient on either side, and the 16-bit partitions on the host
        return on_device + largest * zero.itemsize, (partitions + largest) * zero.itemsize
    return on_device, 0


def early_buckets(zero: ZeroSettings) -> int:
    """Bytes of them that are there before a backward's first gradient is complete: at stage 3 the bucket itself, and
    at stage 1 those of an earlier micro-batch."""
    if zero.stage == 3:
        return zero.reduce_bucket_size * zero.itemsize if zero.contiguous_gradients else 0
    if zero.stage == 1 and zero.accumulation > 1 and zero.contiguous_gradients:
        return zero.reduce_bucket_size * zero.itemsize * (2 if zero.overlaps else 1)
    return 0


def collected(units: Sequence[Unit], rank: int, zero: ZeroSettings) -> int:
    """Bytes of a micro-batch's gradients that stage 2 collects beside those that they are added to."""
    if zero.offload or zero.accumulation == 1 or zero.stage != 2 or zero.grad_itemsize != zero.itemsize:
        return 0
    return sum(share_of(unit, rank, zero).touched for unit in units) * zero.itemsize if zero.contiguous_gradients else 0


def whole_gradients(units: Sequence[Unit], zero: ZeroSettings) -> int:
    """Bytes of the gradients of all parameters at stages 0 and 1, which reduce them after backward."""
    return sum(spec.numel for unit in units for spec in unit.params) * zero.itemsize if zero.stage < 2 else 0


def step_gradients(units: Sequence[Unit], zero: ZeroSettings) -> int:
    """Bytes of the gradients that a step makes in the masters' dtype: all at stage 0, of the unit in work at others.

    Sharded, the partition is first flattened in the dtype of accumulation, and both live for a moment where they
    differ.
    """
    if zero.offload or (zero.stage == 0 and zero.dtype == "fp32"):
        return 0
    if zero.stage == 0:
        return sum(unit.partition_numel for unit in units) * _FP32
    largest = max((unit.partition_numel for unit in units), default=0)
    if zero.stage == 1 and zero.grad_itemsize > zero.itemsize:
        return 0
    cast = zero.master_itemsize if zero.grad_itemsize != zero.master_itemsize else 0
    return largest * (cast + zero.grad_itemsize)


def chunk_scratch(
    units: Sequence[Unit], zero: ZeroSettings, *, stored: bool, kept: int = 0, kernels: bool = False
) -> int:
    """Bytes of the fp32 chunks that an elementwise step works in: two, one that rounded momentum is read to, and with
    bf16 masters two that weights and gradient are read to; ``kept`` more. On a GPU, what all of this comes to at most.
    Where ``kernels`` do the work, tables of slices and what was measured; on a CPU nothing where compiled ones do.
    """
    if zero.device == "cpu" and native.is_available():
        return 0
    if zero.device != "cpu" and kernels:
        return max(((len(u.params) + 1) * _LAUNCHED + u.partition_numel // _MEASURED for u in units), default=0)
    lengths = [max(s.numel for s in u.params) if u.cut == "none" else u.partition_numel for u in units]
    longest = max(lengths, default=0)
    if zero.offload or zero.device == "cpu":
        return min(CPU_CHUNK, longest) * _FP32 * (2 + stored + kept + 2 * zero.bf16_masters)
    return min(CUDA_SCRATCH, longest * CUDA_SCRATCH_ELEMENT) + min(CUDA_CHUNK, longest) * _FP32 * kept
