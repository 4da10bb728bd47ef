"""Run a function on several ranks of this machine, optionally in a network of their own.

Ranks are forked from a parent that has imported DeepSpeed once. With ``private_network`` they live in a fresh network
namespace, whose loopback counters then hold their traffic and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world_size, *args)`` on each rank; the results by rank. Raises if a rank fails."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401  (imported once, before the fork)

    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(r, world_size, port, queue, function, args)) for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    for _ in ranks:
        rank, ok, value = queue.get()
        if not ok:
            for process in ranks:
                process.kill()
            raise RuntimeError(f"rank {rank}: {value}")
        results[rank] = value
    for process in ranks:
        process.join()
    return [results[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import deepspeed
    import torch

    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
        deepspeed.logger.setLevel("ERROR")
        deepspeed.init_distributed("gloo")
        queue.put((rank, True, function(rank, world_size, *args)))
    except BaseException as problem:
        queue.put((rank, False, repr(problem)))
        raise


def in_private_network() -> bool:
    """Re-run this program in a network namespace of its own; False where that is not allowed.

    Returns True in the new namespace, where the loopback interface is up and carries only this program.
    """
    if os.environ.get("DS_OPTIM_PRIVATE_NETWORK") == "1":
        return True
    program = Path(sys.argv[0])
    command = [sys.executable, "-m", f"benchmarks.{program.stem}", *sys.argv[1:]]
    trial = ["unshare", "-n", "sh", "-c", "ip link set lo up"]
    try:
        allowed = subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        return False
    os.environ["DS_OPTIM_PRIVATE_NETWORK"] = "1"
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *command])


def loopback_bytes() -> int:
    """Bytes that have passed this namespace's loopback interface, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("this namespace has no loopback interface")
