"""The life of one rank: what runs in the forked process, from environment to outcome."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

LINGER_SECONDS = 2.0
"""How long a rank that raised keeps its sockets open for the others to reach their own error."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's orders. Crosses the process border pickled, the function by its name."""

    rank: int
    world_size: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: dict[str, str | None]
    log_path: str
    init: bool
    backend: str
    cuda: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one rank: its value, or the exception it raised.

    `error_type` is empty where the rank returned. `message` is `str(exception)`; `when` is the
    monotonic clock, one for the whole machine, by which the first error is told from its echoes.
    """

    rank: int
    value: Any = None
    error_type: str = ""
    message: str = ""
    traceback: str = ""
    log: str = ""
    when: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error_type


def rank_main(connection: Connection, order: bytes) -> None:
    """Run one Job (`order`, pickled) and send its Outcome, pickled, over `connection`."""
    os.setpgid(0, 0)
    release = threading.Event()
    threading.Thread(target=_watch, args=(connection, release), daemon=True).start()
    job: Job | None = None
    try:
        log_path, rank, blob = pickle.loads(order)
        _redirect_output(log_path)
        job = pickle.loads(blob)
        value = _run(job)
        connection.send_bytes(pickle.dumps(Outcome(rank=rank, value=value, when=time.monotonic())))
        release.wait()
    except BaseException as error:
        traceback.print_exc()
        outcome = Outcome(
            rank=rank,
            error_type=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            when=time.monotonic(),
        )
        connection.send_bytes(pickle.dumps(outcome))
        release.wait(LINGER_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    # Destructors of process groups and exit hooks talk to ranks that may be gone.
    os._exit(0)


def _run(job: Job) -> Any:
    """Set up the rank as a launcher would, join the process group if asked, call the function."""
    for name, setting in job.environment.items():
        if setting is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = setting
    import torch

    torch.set_num_threads(1)
    if job.cuda:
        torch.cuda.set_device(job.rank)
    if job.init:
        import deepspeed

        deepspeed.init_distributed(dist_backend=job.backend, verbose=False)
    return job.function(job.rank, job.world_size, *job.args)


def _watch(connection: Connection, release: threading.Event) -> None:
    """Wait for the parent's leave to end; end at once, children included, if the parent is gone."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
    release.set()


def _redirect_output(path: str) -> None:
    """Send both streams of this process to a file, and let SIGUSR1 write all stacks there."""
    log: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115  (open for the life of the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(file=log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
