"""The files of a checkpoint, between DeepSpeed and the disk: a write that fails on one rank leaves none waiting.

DeepSpeed's ``save_checkpoint`` ends in a barrier: a rank whose disk is full would raise before it and leave the others
there. Its checkpoint engine is an interface of its own; this one notes the failure and lets every rank come through.
What DeepSpeed writes beside it, a copy of its recovery script and of files offloaded to NVMe, raises on the rank where
it fails, which then takes the part in the end of the save that the others wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ds_optim.machine import ranks
from ds_optim.machine.files import write_reason
from ds_optim.zero.checkpoints.folder import SCRIPTS, Stamps, stamped
from ds_optim.zero.checkpoints.safe import load


class CheckpointFiles:
    """A checkpoint engine around DeepSpeed's: same files, failures noted, nothing but data loaded.

    Attributes:
        problem: why the first file that failed on this rank did, in one line; None while none has.
        note: why a script that no checkpoint needs was not written; None where it was.
    """

    def __init__(self, engine: Any, written: Callable[[], None], stamps: Stamps | None = None) -> None:
        self._engine = engine
        self._written = written
        self._stamps = stamps
        self.problem: str | None = None
        self.note: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder of the checkpoint."""
        try:
            self._engine.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._fail(error, Path(path))

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, unless one before it failed."""
        if self.problem is not None:
            return
        try:
            self._engine.save(stamped(state_dict, Path(path).name, self._stamps), path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            self._fail(error, Path(path))
            with suppress(OSError):  # what was half written fills the disk for the others too
                Path(path).unlink()
        self._written()

    def fail_beside(self, error: OSError, folder: Path) -> None:
        """Note what DeepSpeed could not write by itself: a script costs no checkpoint."""
        path = Path(str(error.filename2 or error.filename or folder))
        if path.name not in SCRIPTS:
            self._fail(error, path)
            return
        self.note = f"{path.name} could not be written: {write_reason(error, folder)}"
        if error.filename2 is not None:  # torn in the middle: better none than one that ends anywhere
            with suppress(OSError):
                path.unlink()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file as data: no code that a checkpoint brings along runs. Collective: every rank reads as many.

        Raises ``UserError`` where it holds more than tensors, plain values and DeepSpeed's own records; on the other
        ranks what ``ranks.together`` makes of it. No rank goes on with what another one cannot read.
        """
        return ranks.together(lambda: load(Path(path), map_location=map_location, mmap=False))

    def _fail(self, error: BaseException, path: Path) -> None:
        if self.problem is None:
            self.problem = f"{write_reason(error, path.parent)} ({path.name})"


def write(
    engine: Any, folder: Path, state: dict[str, Any], written: Callable[[], None], stamps: Stamps | None = None
) -> CheckpointFiles:
    """Let DeepSpeed write the files of the checkpoint ``folder``; what failed on this rank is noted. Collective."""
    with guarded(engine, written, stamps) as files:
        try:
            engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=state, save_latest=False)
        except OSError as error:
            files.fail_beside(error, folder)
            _end_save(engine)
    return files


def _end_save(engine: Any) -> None:
    """What all ranks do together once their files are written, for one that was thrown out before it."""
    import deepspeed

    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()
    deepspeed.comm.barrier()


@contextmanager
def guarded(
    engine: Any, written: Callable[[], None] = lambda: None, stamps: Stamps | None = None
) -> Iterator[CheckpointFiles]:
    """DeepSpeed's ``engine`` with its files guarded for a while, and stamped; ``written`` is called after each."""
    files = CheckpointFiles(engine.checkpoint_engine, written, stamps)
    engine.checkpoint_engine = files
    try:
        yield files
    finally:
        engine.checkpoint_engine = files._engine
