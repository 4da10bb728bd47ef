"""Cells of a sweep over several nodes: one driver, which has a launcher of ``launch/`` start the ranks of each cell.

The folder of the sweep must be one that all nodes share: ranks read their cell there and leave their logs in it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_optim.errors import UserError
from ds_optim.sweep.launch import CellJob, CellOutcome, failures
from ds_optim.sweep.worker import RESULT_FILE

#: The command that starts a cell's ranks, without the cell's folder; the scripts of ``launch/`` set it.
VARIABLE = "DS_OPTIM_CELL_LAUNCHER"
LAUNCHER_LOG = "launcher.log"
#: How long a launcher may take to end its ranks when it is asked to, and how long after it was told to.
_ASKED_S = 20.0
_TOLD_S = 15.0


class CommandLauncher:
    """Runs cells by a command, ``COMMAND FOLDER``, that starts a cell's ranks on all nodes and waits."""

    def __init__(self, command: Sequence[str]) -> None:
        if not command:
            raise UserError(f"{VARIABLE} is empty: it is the command that starts a cell's ranks")
        self._command = list(command)
        self._cells = 0

    def __call__(self, job: CellJob) -> CellOutcome:
        begin = time.monotonic()
        self._cells += 1
        # Each cell's ranks are found by a name of their own: what is left of one must not be taken for the next.
        token = f"{os.getpid()}-{int(time.time())}-{self._cells}"
        with (job.folder / LAUNCHER_LOG).open("wb") as log:
            process = subprocess.Popen(
                [*self._command, str(job.folder.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DS_OPTIM_RUN": f"{os.uname().nodename}-{token}"},
                start_new_session=True,
            )
            late = False
            try:
                process.wait(job.timeout_s)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(process)
        reason = None
        if late:
            reason = f"timed out after {job.timeout_s:g} s"
        elif process.returncode != 0 or not (job.folder / RESULT_FILE).exists():
            reason = reason_of(job.folder, job.ranks, process.returncode)
        return CellOutcome(reason=reason, wall_s=time.monotonic() - begin)


def launcher_from(environment: Mapping[str, str]) -> CommandLauncher | None:
    """The launcher that the environment names; None where cells run on this machine."""
    text = environment.get(VARIABLE)
    return None if text is None else CommandLauncher(shlex.split(text))


def reason_of(folder: Path, ranks: int, status: int) -> str:
    """Why a cell failed, in one line with rank and node: of several, the one that did not merely lose its peer."""
    told = failures(folder, range(ranks))
    lines_of = [f"rank {failure.rank} on {failure.node}: {failure.line}" for failure in told]
    if told and not told[0].echo:
        return lines_of[0]
    # No rank had a reason of its own: one was killed, or never started. Its launcher may know.
    lines = [line.strip() for line in _read(folder / LAUNCHER_LOG).splitlines() if line.strip()]
    known = [line for line in lines if "error: " in line or "exit code" in line or line.startswith("== ")]
    last = (known or lines or ["(no output)"])[0][:300]
    peers = f"; {lines_of[0]}" if told else ""
    return f"the launcher ended with status {status}: {last}{peers}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher with its ranks: the first signal lets them save, the second one ends them."""
    for seconds in (_ASKED_S, _TOLD_S):
        if process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
