"""What users write on the command line, checked; each mistake is one line that says what to write instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ds_optim.errors import UserError, instead
from ds_optim.machine.forked import usable_gpus

LEAST_ROUNDS = 2


def at_least(option: str, value: float, least: float) -> None:
    """Raise UserError where ``value`` is below ``least``, or no number."""
    if not value >= least:
        raise UserError(f"{option}: {value:g} is too few; write {least:g} or more")


def names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The comma-separated parts of ``text``, each one of ``known``, in the order written, each once.

    Capitals and underscores make no difference.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{option}: nothing is named; write one or more of {', '.join(known)}")
    by_word = {_word(name): name for name in known}
    for part in parts:
        if _word(part) not in by_word:
            raise UserError(f"{option}: unknown '{part}'; {instead(part, known)}")
    return list(dict.fromkeys(by_word[_word(part)] for part in parts))


def stages(text: str) -> list[int]:
    """ZeRO stages, comma-separated."""
    return [int(stage) for stage in names("--stages", text, ("0", "1", "2", "3"))]


def shapes(text: str) -> list[tuple[int, int]]:
    """Shapes such as ``768x2304,3072x768``."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", part)
        if match is None:
            raise UserError(f"--shapes: '{part}' is no shape; write rows x columns, e.g. 768x2304")
        found.append((int(match[1]), int(match[2])))
    if not found:
        raise UserError("--shapes: nothing is named; write rows x columns, e.g. 768x2304,3072x768")
    return list(dict.fromkeys(found))


def device(name: str) -> tuple[torch.device, str | None]:
    """(device, None), or where this machine has no such device (device, why nothing can be measured)."""
    if name == "auto":
        return torch.device("cuda" if usable_gpus() else "cpu"), None
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device: unknown '{name}'; {instead(name, ('auto', 'cpu', 'cuda'))}")
    missing = name == "cuda" and not torch.cuda.is_available()
    return torch.device(name), "this machine has no CUDA device" if missing else None


def _word(name: str) -> str:
    """What two ways to write a name have in common: LionMuon is lion_muon in other commands."""
    return name.lower().replace("_", "")
