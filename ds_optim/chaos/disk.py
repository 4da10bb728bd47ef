"""A run on a small file system of its own that fills up, and gets room again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_optim.chaos.faults import BALLAST, Fault
from ds_optim.chaos.killed_run import KILL_BOUND_S, SAVE_EVERY, Attempts, Outcome
from ds_optim.chaos.ranks import RANKS, ForkServer
from ds_optim.job.exits import SAVE_FAILED

_SIZE_MIB = 8
_STEPS = 8
#: The step from which on the disk is full, and what the table calls the save that finds it so.
FULL_FROM = {1: "the first save", 3: "the save"}


class NoFileSystem(Exception):
    """Why there is no small file system here; one line."""


def fill_disk(
    server: ForkServer, folder: Path, settings: dict[str, Any], full_from: int, tell: Callable[[Outcome], None]
) -> Attempts:
    """Fill the disk before a save; the run must go on, keep what it had, and resume when there is room.

    Raises ``NoFileSystem`` where there is no small disk to fill.
    """
    plan = {**settings, "steps": _STEPS, "save_every": SAVE_EVERY}
    reference = yield server.start(folder / "uninterrupted", {**plan, "save_every": 0}, None)
    kept = full_from // SAVE_EVERY * SAVE_EVERY
    with small_file_system(folder / "disk") as disk:
        out = disk / "out"
        fault = Fault(kind="disk full", place="forward", rank=0, step=full_from)
        full = yield server.start(folder / "full", {**plan, "out": out}, fault, KILL_BOUND_S)
        (out / BALLAST).unlink(missing_ok=True)
        again = {"resume": True} if kept else {"force": True}
        room = yield server.start(folder / "room", {**plan, "out": out, **again}, None)
    wrong = None
    if full.hung or full.statuses != [SAVE_FAILED] * RANKS:
        wrong = f"the ranks ended with {full.statuses}, not {SAVE_FAILED}"
    elif "No space left on device" not in full.lines[0]:
        wrong = "it did not say that the disk is full"
    elif full.losses != reference.losses:
        wrong = "its losses are not those of the uninterrupted run"
    elif room.resumed != kept or room.statuses != [0] * RANKS:
        wrong = f"it went on from step {room.resumed}, not {kept}, and ended with {room.statuses}"
    elif any(loss != reference.losses[rank][step] for rank in range(RANKS) for step, loss in room.losses[rank].items()):
        wrong = "the losses after it are not those of the uninterrupted run"
    tell(
        Outcome(
            fault="disk full",
            where=FULL_FROM[full_from],
            lost=full.reached - (room.resumed or 0),
            allowed=full.reached - kept,
            end_s=full.end_s,
            bound_s=KILL_BOUND_S,
            wrong=wrong,
        )
    )


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """A tmpfs of a few MiB at ``folder``; raises ``NoFileSystem`` where this user may not mount one."""
    mount = shutil.which("mount")
    if mount is None or not sys.platform.startswith("linux"):
        raise NoFileSystem("no mount command for a tmpfs")
    folder.mkdir(parents=True)
    command = [mount, "-t", "tmpfs", "-o", f"size={_SIZE_MIB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoFileSystem(" ".join(done.stderr.split())[:120] or "mounting a tmpfs is not allowed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
