"""Run a function on several ranks, each a fresh process forked from one parent that has torch and
DeepSpeed imported.

    def work(rank: int, world_size: int, scale: float) -> float: ...

    values = run_ranks(3, work, 0.5)          # [value of rank 0, of rank 1, of rank 2]

The function is found in the rank by its module and name, so it stands at the top level of a test
module; arguments and results are pickled, tensors by value. Fresh processes, because DeepSpeed
keeps its groups and communication backend in module globals; one parent, because it takes
seconds to import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import pytest
import torch

from .server import warm_up
from .worker import Job, Outcome, rank_main

T = TypeVar("T")

ECHO_SECONDS = 0.5
"""After a first error the other ranks get this long: the error that came first is then known."""
LOG_TAIL = 4000
"""Characters of a rank's output that an error shows."""
DIED = "Died"
"""Stands for the exception's type in the Outcome of a rank whose process ended without an answer."""

_gpus = 0


class RankError(Exception):
    """A rank raised or died. `text` holds its traceback and the end of its output."""

    def __init__(self, rank: int, text: str, *, error_type: str = "", message: str = "") -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank
        self.text = text
        self.error_type = error_type
        self.message = message


class RankTimeout(RankError):
    """Ranks did not end in time. `text` holds the stacks of those that were still running."""


def configure(gpus: int) -> None:
    """Use `gpus` GPUs and NCCL in every later `run_ranks`; 0 means CPU and gloo."""
    global _gpus
    _gpus = gpus


def device() -> torch.device:
    """The device of the calling rank, or of the test that asks in the parent."""
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@overload
def run_ranks(
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    timeout: float = ...,
    env: Mapping[str, str | None] | None = ...,
    init: bool = ...,
    expect_error: Literal[False] = ...,
) -> list[T]: ...


@overload
def run_ranks(
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    timeout: float = ...,
    env: Mapping[str, str | None] | None = ...,
    init: bool = ...,
    expect_error: Literal[True],
) -> list[Outcome]: ...


def run_ranks(
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str | None] | None = None,
    init: bool = True,
    expect_error: bool = False,
) -> list[T] | list[Outcome]:
    """Call `function(rank, world_size, *args)` on every rank; the results in order of rank.

    timeout: seconds until everything is killed. env: set on top of the ranks' environment, None
    unsets. init: call `deepspeed.init_distributed` first. expect_error: return every rank's
    Outcome, value or error, and raise only on a hang.

    Raises RankError for the first rank that raised or died, the others being killed, and
    RankTimeout with all stacks. Skips the test where it needs more GPUs than `--gpus` gave.
    """
    if _gpus and world_size > _gpus:
        pytest.skip(f"needs {world_size} GPUs, --gpus gave {_gpus}")
    warm_up(_gpus)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _Ranks(Path(folder)) as ranks:
        ranks.start(world_size, function, args, env or {}, init)
        outcomes = ranks.collect(timeout, stop_at_error=not expect_error)
    if expect_error:
        return outcomes
    return [outcome.value for outcome in outcomes]


def assert_all_raised(outcomes: list[Outcome], error_type: str, *parts: str) -> str:
    """Every rank raised `error_type` with the same one line, which holds all `parts`; that line."""
    assert [o.error_type for o in outcomes] == [error_type] * len(outcomes), _show(outcomes)
    lines = {o.message for o in outcomes}
    assert len(lines) == 1, _show(outcomes)
    line = lines.pop()
    assert "\n" not in line, f"not one line: {line!r}"
    for part in parts:
        assert part in line, f"{part!r} not in {line!r}"
    return line


class _Ranks:
    """The processes of one call: started, heard, and gone when the `with` block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> _Ranks:
        # The parent serves the store, at a port that the system chose while binding it: there is
        # no moment at which another process could take the port.
        self.store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600)
        )
        return self

    def start(
        self,
        world_size: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        env: Mapping[str, str | None],
        init: bool,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        for rank in range(world_size):
            job = Job(
                rank=rank,
                world_size=world_size,
                function=function,
                args=args,
                environment={**self._environment(rank, world_size), **env},
                log_path=self._log_path(rank),
                init=init,
                backend="nccl" if _gpus else "gloo",
                cuda=bool(_gpus),
            )
            order = pickle.dumps((job.log_path, rank, pickle.dumps(job)))
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(theirs, order), name=f"rank-{rank}")
            self.connections.append(ours)
            process.start()
            self.processes.append(process)
            theirs.close()

    def collect(self, timeout: float, stop_at_error: bool) -> list[Outcome]:
        """Every rank's outcome, in order of rank; see run_ranks for what it raises."""
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        failed = False
        while len(outcomes) < len(self.processes):
            waiting = [c for r, c in enumerate(self.connections) if r not in outcomes]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = self.connections.index(connection)
                outcomes[rank] = self._hear(rank)
            if stop_at_error and not failed and any(not o.ok for o in outcomes.values()):
                failed = True
                deadline = time.monotonic() + ECHO_SECONDS
        # The first error is the cause, the others its echoes; a death is heard of later than it happened.
        errors = sorted((o for o in outcomes.values() if not o.ok), key=lambda o: (o.error_type != DIED, o.when))
        if stop_at_error and errors:
            raise self._error(errors[0])
        if len(outcomes) < len(self.processes):
            raise self._timeout(timeout, outcomes)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"go")
        return [replace(outcomes[rank], log=self._log(rank)) for rank in range(len(self.processes))]

    def _hear(self, rank: int) -> Outcome:
        try:
            outcome = pickle.loads(self.connections[rank].recv_bytes())
            assert isinstance(outcome, Outcome)
            return outcome
        except (EOFError, OSError):
            when = time.monotonic()
            self.processes[rank].join(timeout=5.0)
            text = f"the process ended without an answer, exit code {self.processes[rank].exitcode}"
            return Outcome(rank=rank, error_type=DIED, message=text, traceback=text, when=when)

    def _error(self, outcome: Outcome) -> RankError:
        text = f"{outcome.traceback}\n--- output of rank {outcome.rank} ---\n{self._log(outcome.rank)}"
        return RankError(outcome.rank, text, error_type=outcome.error_type, message=outcome.message)

    def _timeout(self, timeout: float, outcomes: Mapping[int, Outcome]) -> RankTimeout:
        running = [rank for rank in range(len(self.processes)) if rank not in outcomes]
        for rank in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        done = [f"rank {o.rank}: {o.error_type or 'returned'} {o.message}" for o in outcomes.values()]
        stacks = [f"--- output and stacks of rank {rank} ---\n{self._log(rank)}" for rank in running]
        text = "\n".join([f"ranks {running} still ran after {timeout:g} s", *done, *stacks])
        return RankTimeout(running[0], text, error_type="RankTimeout", message=text.splitlines()[0])

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 1.0
        told_to_end = sys.exc_info()[0] is None and self.processes
        for process in self.processes:
            if told_to_end:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                _kill_group(process)
            process.join()
            process.close()
        for connection in self.connections:
            connection.close()
        del self.store

    def _environment(self, rank: int, world_size: int) -> dict[str, str | None]:
        port = str(self.store.port)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            # torch's word for "the store is served by who started me, do not open one"
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def _log_path(self, rank: int) -> str:
        return str(self.folder / f"rank{rank}.log")

    def _log(self, rank: int) -> str:
        path = Path(self._log_path(rank))
        return path.read_text(errors="replace")[-LOG_TAIL:] if path.exists() else ""


def _kill_group(process: BaseProcess) -> None:
    """End a rank and what it started, even if it has not yet made its own process group."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _show(outcomes: list[Outcome]) -> str:
    return "\n".join(f"rank {o.rank}: {o.error_type or 'returned'}: {o.message or o.value}" for o in outcomes)
