"""The files of a checkpoint, between DeepSpeed and the disk: a write that fails on one rank leaves none waiting.

DeepSpeed's ``save_checkpoint`` ends in a barrier: a rank whose disk is full would raise before it and leave the others
there. Its checkpoint engine is an interface of its own; this one notes the failure and lets every rank come through.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ds_optim.errors import UserError
from ds_optim.train import ranks
from ds_optim.zero.checkpoints.safe import allowed_classes

_FULL_BYTES = 1 << 20


class CheckpointFiles:
    """A checkpoint engine around DeepSpeed's: same files, failures noted, nothing but data loaded.

    Attributes:
        problem: why the first file that failed on this rank did, in one line; None while none has.
    """

    def __init__(self, engine: Any, written: Callable[[], None]) -> None:
        self._engine = engine
        self._written = written
        self.problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, unless one before it failed."""
        if self.problem is not None:
            return
        try:
            self._engine.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            self.problem = f"{write_reason(error, Path(path).parent)} ({Path(path).name})"
            with suppress(OSError):  # what was half written fills the disk for the others too
                Path(path).unlink()
        self._written()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file as data: no code that a checkpoint brings along runs. Collective: every rank reads as many.

        Raises ``pickle.UnpicklingError`` where it holds more than tensors, plain values and DeepSpeed's own records; on
        the other ranks what ``ranks.together`` makes of it. No rank goes on with what another one cannot read.
        """
        return ranks.together(lambda: self._read(path, map_location))

    def _read(self, path: str, map_location: Any) -> Any:
        try:
            with torch.serialization.safe_globals(list(allowed_classes())):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, EOFError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise UserError(f"{path} cannot be loaded: {reason or 'it is damaged'}") from None


@contextmanager
def guarded(engine: Any, written: Callable[[], None] = lambda: None) -> Iterator[CheckpointFiles]:
    """DeepSpeed's ``engine`` with its files guarded for a while; ``written`` is called after each."""
    files = CheckpointFiles(engine.checkpoint_engine, written)
    engine.checkpoint_engine = files
    try:
        yield files
    finally:
        engine.checkpoint_engine = files._engine


def write_reason(error: BaseException, folder: Path) -> str:
    """Why a write failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return "No space left on device"
    return " ".join(str(error).split())[:160] or type(error).__name__
