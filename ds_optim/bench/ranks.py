"""Run a function on several ranks of this machine, and read what a network namespace of their own has carried.

The ranks are forked from the parent that ``ds-optim compare`` forks its cells from: it has imported DeepSpeed once.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ds_optim.sweep.launch import ForkserverLauncher, free_port, worker_environment
from ds_optim.sweep.worker import end_with_launcher, reason_line, redirect

#: A shell that has a loopback interface and no other; its arguments are the command.
_NAMESPACE = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')


class RankFailedError(RuntimeError):
    """A rank ended badly; the message names it and says why."""


def default_ranks() -> int:
    """A rank a GPU; four on a machine that has none."""
    import torch

    return torch.cuda.device_count() or 4


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world_size, *args)`` on each rank; the results by rank.

    ``function`` is a module's own, by name. Raises RankFailedError if a rank fails; no rank is left
    behind.
    """
    launcher = ForkserverLauncher(world_size)
    shared = {**worker_environment(world_size), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("forkserver")
    processes: list[Any] = []
    pipes: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher.prepare(folder, ["adamw"])
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                arguments = (rank, world_size, own, str(_log(folder, rank)), sender, function, args)
                processes.append(context.Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
                sender.close()  # the rank has the only one: when it dies, reading ends
                pipes[receiver] = rank
            return _results(pipes, folder)
        finally:
            for process in processes:
                process.join(0 if pipes else 10)
                if process.is_alive():
                    process.kill()
                    process.join()


def _results(pipes: dict[Connection, int], folder: Path) -> list[Any]:
    """What each rank sends; ``pipes`` is empty when all have."""
    results: dict[int, Any] = {}
    while pipes:
        for ready in wait(list(pipes)):
            assert isinstance(ready, Connection)
            rank = pipes[ready]
            try:
                failure, value = ready.recv()
            except EOFError:
                failure, value = (
                    f"killed, out of memory perhaps; last line of its log: {_last_line(folder, rank)}",
                    None,
                )
            if failure is not None:
                raise RankFailedError(f"rank {rank}: {failure}")
            results[rank] = value
            del pipes[ready]
    return [results[rank] for rank in sorted(results)]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _last_line(folder: Path, rank: int) -> str:
    lines = _log(folder, rank).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")


def _work(
    rank: int,
    world_size: int,
    environment: Mapping[str, str],
    log: str,
    sender: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of a forked rank; what it and DeepSpeed print goes to ``log``."""
    os.environ.update(environment)
    end_with_launcher()
    redirect(Path(log))
    import torch

    from ds_optim.machine import ranks

    try:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        ranks.join()
        sender.send((None, function(rank, world_size, *args)))
        ranks.leave()
    except BaseException as problem:
        sender.send((reason_line(problem), None))
        # Tearing down a process group after a failure waits for peers that are gone.
        os._exit(1)


def private_network() -> tuple[str, ...]:
    """What to put before a command so that it runs in a network of its own; nothing where that is not permitted."""
    try:
        allowed = subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False, timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        allowed = False
    return _NAMESPACE if allowed else ()


def loopback_bytes() -> int:
    """Bytes that have passed this namespace's loopback interface, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("this namespace has no loopback interface")
