"""What all ranks must mean alike, since nothing on the wire says it: numbers of rules, options, and what was loaded.

It is compared before the first step. After that a hash of it, 16 bytes in one all-reduce every ``EVERY`` steps, finds
ranks that have come apart since: a schedule that depends on the rank, or a hyperparameter set on one of them alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.matrix.polar import PolarSpec
from ds_optim.optimizers.experts import label_of
from ds_optim.optimizers.rules import STEP
from ds_optim.sharding.binding import Member
from ds_optim.sharding.comm import Comm
from ds_optim.sharding.later import complete

EVERY = 100
NOTHING = "nothing"
"""Stands for the checkpoint of an optimizer that has loaded none."""
_NO_NUMBERS = ("params", "members", "saved")
_LONGEST = 60

Peers = Callable[[torch.optim.Optimizer], "Comm | None"]

_loads: list[Peers] = []


def register_load(peers: Peers) -> None:
    """Ask ``peers`` at every load: the ranks that surely load now, or None."""
    _loads.append(peers)


class Alike:
    """One optimizer's part in the comparison.

    Attributes:
        loaded: what was loaded last, such as "step 300".
    """

    def __init__(self) -> None:
        self.loaded = NOTHING
        self._steps = 0

    def begin(self, comm: Comm, meant: Mapping[str, str]) -> None:
        """Compare everything; collective, before any write.

        Raises:
            UserError: on every rank, with what differs, the ranks and their values.
        """
        self._steps = 0
        check_alike(comm.gather_objects(self._all(meant)))

    def count(self, comm: Comm, meant: Callable[[], Mapping[str, str]]) -> None:
        """Count a step, and compare hashes at every ``EVERY``-th since the beginning; collective then.

        Raises:
            UserError: as :meth:`begin`.
        """
        self._steps += 1
        if self._steps % EVERY or comm.world_size == 1:
            return
        own = self._all(meant())
        number = int.from_bytes(hashlib.sha256(repr(sorted(own.items())).encode()).digest()[:7], "big")
        ends = torch.tensor([number, -number], dtype=torch.int64, device=comm.device(torch.device("cpu")))
        most, least = comm.all_reduce(ends, "max").tolist()
        if most != -least:
            check_alike(comm.gather_objects(own))

    def _all(self, meant: Mapping[str, str]) -> dict[str, str]:
        return {**meant, "checkpoint that was loaded": self.loaded}


def check_alike(answers: Sequence[Mapping[str, str]]) -> None:
    """Refuse answers, one a rank, that differ; what comes first in rank 0's is named.

    Raises:
        UserError: with what differs, the ranks and their values.
    """
    for what in dict.fromkeys(what for answer in answers for what in answer):
        ranks: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            ranks.setdefault(answer.get(what, "none"), []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{_cut(value)} on {_listed(own)}" for value, own in ranks.items())
            raise UserError(
                f"the ranks disagree on the {what} ({found}): give every rank the same model, parameter groups, "
                "optimizer options, schedule and checkpoint"
            )


def numbers_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Everything that rules read of parameter groups, by a name that a user knows it by."""
    found = {"number of parameter groups": str(len(groups))}
    for number, group in enumerate(groups):
        where = f"of parameter group {label_of(group, number)!r}"
        found |= {f"{key} {where}": _plain(value) for key, value in group.items() if key not in _NO_NUMBERS}
    return found


def meant_by(
    options: dict[str, Any],
    polar: PolarSpec,
    exchange: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    held: Sequence[Sequence[Member]] | None,
) -> dict[str, str]:
    """All that the ranks must have alike, by names that a user knows; held: the parameters, where they must be too."""
    alike = {**_options_of(options, polar, exchange), **numbers_of(groups)}
    return alike if held is None else {**alike, **_parameters_of(groups, held)}


def _options_of(options: dict[str, Any], polar: PolarSpec, exchange: Mapping[str, Any]) -> dict[str, str]:
    """An optimizer's options, the JSON's two objects by their keys."""
    objects = {"polar": vars(polar), "exchange": exchange}
    inner = {f"{name}.{key}": value for name, own in objects.items() for key, value in own.items()}
    return {key: str(value) for key, value in (options | inner).items()}


def _parameters_of(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Member]]) -> dict[str, str]:
    """Names, shapes and views of the groups' parameters: a digest for each group."""
    found = {}
    for number, (group, own) in enumerate(zip(groups, members, strict=False)):
        text = repr([(m.spec, m.view) for m in own])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        found[f"parameters or views of parameter group {label_of(group, number)!r}"] = digest
    return found


def steps_of(state_dict: Mapping[str, Any]) -> int:
    """How many steps a saved state has seen."""
    return max((int(entry.get(STEP, 0)) for entry in state_dict["state"].values()), default=0)


def join_load(optimizer: torch.optim.Optimizer, problem: Exception | None, meant: str) -> None:
    """Let the ranks of a load agree, before any of them writes; collective where an engine loads.

    Args:
        problem: why this rank cannot load.
        meant: what it is about to load.

    Raises:
        UserError: on all ranks, where one cannot load, or loads another checkpoint.
        RuntimeError: another rank is gone.
    """
    complete()
    comm = next((found for found in (peers(optimizer) for peers in _loads) if found is not None), Comm())
    mine = None if problem is None else (isinstance(problem, UserError), " ".join(str(problem).split()))
    try:
        answers = comm.gather_objects((mine, meant))
    except RuntimeError as error:
        raise RuntimeError(
            f"another rank did not load its part of the checkpoint, and nothing was loaded ({_cut(str(error))})"
        ) from None
    if problem is not None and all(failed for failed, _ in answers):
        raise problem
    for rank, (failed, _) in enumerate(answers):
        if failed is not None:
            kind = UserError if failed[0] else RuntimeError
            raise kind(f"rank {rank} cannot load the checkpoint, and no rank has: {failed[1]}") from problem
    check_alike([{"checkpoint to be loaded": found} for _, found in answers])


def _plain(value: Any) -> str:
    """A value in words: equal numbers are equal, whatever type holds them."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_plain(own)}' for key, own in value.items())}}}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)
    number = float(value)
    return repr(int(value)) if number.is_integer() else repr(number)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
