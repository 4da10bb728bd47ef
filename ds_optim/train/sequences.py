"""Sequences that several ranks share (Ulysses, by DeepSpeed's ALST): each computes a part of every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_optim.errors import UserError
from ds_optim.job import models
from ds_optim.job.settings import TrainSettings
from ds_optim.machine import ranks
from ds_optim.zero.refused import SEQUENCE
from ds_optim.zero.support import sequences_cut_in

_ATTENTION = "sdpa"
"""Of transformers, which ALST's attention calls for whole sequences of some of the heads."""
_made: dict[str, Any] = {}


@dataclass(frozen=True)
class Parts:
    """In how many parts a sequence is cut, and which of them is this rank's.

    scale: of the loss, so that the gradient is that of the mean over all tokens: at stages 0 to 2 DeepSpeed divides
    what it has summed by the sequences and not by the ranks.
    """

    count: int = 1
    own: int = 0
    scale: float = 1.0

    def losses(self, model: Any, windows: Tensor) -> Tensor:
        """As :func:`models.next_token_losses`, of this rank's part of each sequence."""
        return models.next_token_losses(model, windows, self.count, self.own)


def parts_of(settings: TrainSettings) -> Parts:
    """This rank's part of the sequences that a run's JSON has cut."""
    count = sequences_cut_in(settings.deepspeed) or 1
    return Parts(count, ranks.rank() % count, 1.0 / count if settings.stage < 3 else 1.0)


def check_parts(settings: TrainSettings) -> None:
    """Refuse what cannot be cut.

    Raises:
        UserError: with what to write instead.
    """
    count = sequences_cut_in(settings.deepspeed) or 1
    if count > 1 and settings.seq_len % count:
        raise UserError(
            f"{SEQUENCE} is {count}, which does not divide --seq-len {settings.seq_len}: write a multiple of {count}"
        )
    if count > 1 and settings.zero_init:
        raise UserError(f"--zero-init beside {SEQUENCE} is not supported: leave one of them out")


def mpu_of(model: Any, settings: TrainSettings) -> Any:
    """DeepSpeed's ``mpu`` of the ranks that share a sequence, with ALST's attention in transformers' place; None where
    no sequence is cut.

    Collective. DeepSpeed keeps both for the life of a process: another model or shape is refused there.
    """
    count = sequences_cut_in(settings.deepspeed) or 1
    if count == 1 and not _made:
        return None
    key = repr((count, settings.micro_batch, settings.seq_len, model.config.to_dict()))
    if _made and key not in _made:
        raise UserError(f"{SEQUENCE}: DeepSpeed cuts sequences of one shape and model in a process; start another one")
    if not _made:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        try:
            _made[key] = UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=model,
                core_attn_implementation=_ATTENTION,
                sequence_parallel_size=count,
                micro_batch_size=settings.micro_batch,
                seq_length=settings.seq_len,
                seq_length_is_variable=False,
            )
        except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
            raise UserError(f"{SEQUENCE} = {count} cannot be had of this model: {models.reason_of(error)}") from None
    return _made[key]
