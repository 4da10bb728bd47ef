"""Sequence parallelism, as DeepSpeed 0.19.8 has it: an ``mpu`` says which ranks share a sequence.

ZeRO cuts parameters, gradients and optimizer state over all ranks then, those of one sequence among them: layouts are
those of as many data-parallel ranks. What differs is how many sequences there are to a batch, and that DeepSpeed
divides summed gradients by the sequences at stages 0 to 2, and by the ranks at stage 3 with ``reduce_scatter``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_optim.errors import UserError
from ds_optim.zero.refused import SEQUENCE
from ds_optim.zero.support import check_sums, sequences_cut_in, tensor_parallel_size

_WAY = "mpu=UlyssesSPAttentionHF.register_with_transformers(…), of deepspeed.runtime.sequence_parallel.ulysses_sp"
_MESH = (
    "over a mesh DeepSpeed 0.19 sums gradients over its data-parallel ranks alone, and the weights of ranks that share "
    f"a sequence move apart; pass {_WAY}, and neither mesh_param nor data_parallel_size"
)


def sequence_ranks(mpu: Any) -> int:
    """How many ranks share a sequence, by an ``mpu`` that DeepSpeed takes for sequence parallelism alone."""
    return int(mpu.get_sequence_parallel_world_size()) if is_of_sequences(mpu) else 1


def is_of_sequences(mpu: Any) -> bool:
    """Whether an ``mpu`` is of sequence parallelism alone: DeepSpeed's own test."""
    return hasattr(mpu, "initialize_sequence_parallel")


def check_sequence(config: Mapping[str, Any], mpu: Any, mesh: Any = None) -> int:
    """Refuse what DeepSpeed makes nothing of, or something else than was asked for.

    Args:
        config: what the engine is built with.
        mpu, mesh: the call's, or the engine's.

    Returns:
        The ranks that share a sequence.

    Raises:
        UserError: with what to write instead.
    """
    asked, size = sequences_cut_in(config), sequence_ranks(mpu)
    if mesh is not None or (asked is not None and asked > 1 and config.get("data_parallel_size") is not None):
        raise UserError(f"a mesh is not supported with ds_optim's optimizers: {_MESH}")
    if asked is not None and asked > 1 and mpu is None:
        raise UserError(
            f"{SEQUENCE} = {asked} alone cuts no sequence, and makes DeepSpeed count fewer of them: pass {_WAY}, or "
            "set it to 1"
        )
    if asked is not None and is_of_sequences(mpu) and asked != size:
        raise UserError(f"{SEQUENCE} = {asked}, and the mpu shares a sequence among {size} ranks: write {size}")
    if size > 1 and tensor_parallel_size(config) > 1:
        raise UserError(
            "sequence and tensor parallelism together are not supported: pass no mpu, or set autotp_size to 0"
        )
    check_sums(config, size)
    return size
