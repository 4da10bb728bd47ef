"""Run a function on several ranks of this machine, in a network namespace of their own where that is asked.

The ranks are forked from a parent that has imported DeepSpeed once.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ds_optim.machine.child import LOG_FILE, begin, last_line, leave, reason_line
from ds_optim.machine.forked import ForkedRanks, end, usable_gpus

#: A shell that has a loopback interface and no other; its arguments are the command.
_NAMESPACE = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')


class RankFailedError(RuntimeError):
    """A rank ended badly; the message names it and says why."""


def default_ranks() -> int:
    """A rank a GPU; four on a machine that has none."""
    return usable_gpus() or 4


def run(world_size: int, function: Callable[..., Any], *args: Any, one_device: bool = False) -> list[Any]:
    """``function(rank, world_size, *args)`` on each rank; the results by rank.

    ``function`` is a module's own, by name. one_device: all ranks on the first accelerator, over gloo. Raises
    RankFailedError if a rank fails; no rank is left behind.
    """
    forked = ForkedRanks(world_size, ("ds_optim.train.loop", "ds_optim.bench.ranks"), one_device=one_device)
    backend = "gloo" if one_device else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forked.build_ops(folder, ["adamw"])
        ends = [multiprocessing.get_context("forkserver").Pipe(duplex=False) for _ in range(world_size)]
        logs = [folder / LOG_FILE.format(rank=rank) for rank in range(world_size)]
        processes = forked.start(
            _work, lambda rank: (rank, world_size, str(logs[rank]), ends[rank][1], backend, function, args)
        )
        pipes: dict[Connection, int] = {}
        for rank, (receiver, sender) in enumerate(ends):
            sender.close()  # the rank has the only one: when it dies, reading ends
            pipes[receiver] = rank
        try:
            return _results(pipes, logs)
        finally:
            for process in processes:
                process.join(0 if pipes else 10)
            end(processes)


def _results(pipes: dict[Connection, int], logs: Sequence[Path]) -> list[Any]:
    """What each rank sends; ``pipes`` is empty when all have."""
    results: dict[int, Any] = {}
    while pipes:
        for ready in wait(list(pipes)):
            assert isinstance(ready, Connection)
            rank = pipes[ready]
            try:
                failure, value = ready.recv()
            except EOFError:
                failure, value = f"killed, out of memory perhaps; last line of its log: {last_line(logs[rank])}", None
            if failure is not None:
                raise RankFailedError(f"rank {rank}: {failure}")
            results[rank] = value
            del pipes[ready]
    return [results[rank] for rank in sorted(results)]


def _work(
    environment: Mapping[str, str],
    rank: int,
    world_size: int,
    log: str,
    sender: Any,
    backend: str | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of a forked rank; what it and DeepSpeed print goes to ``log``."""
    begin(environment, Path(log))
    import torch

    from ds_optim.machine import ranks
    from ds_optim.machine.plugins import load_plugins

    try:
        load_plugins()
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        ranks.join(backend=backend)
        sender.send((None, function(rank, world_size, *args)))
        ranks.leave()
    except BaseException as problem:
        sender.send((reason_line(problem), None))
        leave(1)


def private_network() -> tuple[str, ...]:
    """What to put before a command so that it runs in a network of its own; nothing where that is not permitted."""
    try:
        allowed = subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False, timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        allowed = False
    return _NAMESPACE if allowed else ()
