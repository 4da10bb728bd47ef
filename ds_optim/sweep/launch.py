"""Starting the ranks of a cell, watching them, and ending all of them when one ends badly.

Importing torch, DeepSpeed and transformers takes many times as long as a short cell, so the ranks of all cells are
forked from one parent that imported them once (``forkserver``). That parent runs no thread, no OpenMP region and no
CUDA call, so a fork of it is a clean process: each cell still has its own processes and its own process group.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ds_optim.errors import UserError
from ds_optim.machine.extensions import use_own_folder
from ds_optim.sweep.worker import FAILURE_FILE, LOG_FILE, build_ops, work

#: Imported once, by the parent of all ranks. Every ZeRO engine imports Muon's module, which takes seconds by itself.
PRELOAD = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.qwen3.modeling_qwen3",
    "ds_optim.train.loop",
    "ds_optim.sweep.measure",
    "ds_optim.sweep.memory_measure",
    "ds_optim.sweep.worker",
)
#: A rank that lost its peer fails with it; this long after the first one ended, the others' own reasons are read.
_SETTLE_S = 1.0
_TERMINATE_S = 1.0
_BUILD_S = 900.0
#: More processes than this on a machine's cores are a typing error, and would take all of its memory.
_RANKS_A_CORE, _LEAST_MOST_RANKS = 8, 64
_COLLECTIVES_OP = "ShareMemCommBuilder"
_ADAM_OP = "FusedAdamBuilder"
#: What a rank says when it was another rank that ended: not the reason.
ECHOES = ("connection", "closed by peer", "timed out", "socket", " failed: ", "broken pipe")


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """What a launcher is asked to run: ``ranks`` workers on the ``cell.json`` in ``folder``."""

    folder: Path
    ranks: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """How it ended: ``reason`` is None if every rank ended well, else one line that names the rank."""

    reason: str | None
    wall_s: float


#: Runs a cell to its end, well or badly, and leaves no process behind. Another launcher (over nodes, by the deepspeed
#: launcher) starts ``python -m ds_optim.sweep.worker FOLDER`` on each rank, with RANK and WORLD_SIZE set.
CellLauncher = Callable[[CellJob], CellOutcome]


def check_ranks(ranks: int) -> None:
    """Raise UserError where so many ranks cannot run on this machine."""
    import torch

    gpus = torch.cuda.device_count()
    most = max(_LEAST_MOST_RANKS, _RANKS_A_CORE * (os.cpu_count() or 1))
    if ranks < 1:
        raise UserError(f"--ranks: {ranks} is too few; write 1 or more")
    if gpus and ranks > gpus and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError(f"--ranks: {ranks} ranks need as many GPUs and there are {gpus}; write {gpus} or fewer")
    if ranks > most:
        raise UserError(f"--ranks: {ranks} ranks are too many for this machine's cores; write {most} or fewer")


class ForkserverLauncher:
    """Runs cells on this machine. Making it starts the importing parent, which is ready when the first cell is.

    Args:
        ranks: processes of a cell; each computes with an equal share of the cores.
    """

    def __init__(self, ranks: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        use_own_folder()
        with environment(parent_environment(ranks)), _without_interrupts():
            _ensure_parent()

    def prepare(self, folder: Path, optimizers: Sequence[str]) -> None:
        """Build the C++ ops that DeepSpeed builds at first use on a CPU, before ranks race for it; once a machine.

        A build that fails is not an error here: the cells that need the op will say so. Its log is in ``folder``.
        """
        ops = [_COLLECTIVES_OP] + [_ADAM_OP] * any(name.lower().endswith(("adam", "adamw")) for name in optimizers)
        arguments = (str(folder), worker_environment(1), ops)
        process = self._context.Process(target=build_ops, args=arguments, name="build")
        process.start()
        try:
            process.join(_BUILD_S)
        finally:
            _end([process])

    def __call__(self, job: CellJob) -> CellOutcome:
        begin = time.monotonic()
        shared = {**worker_environment(job.ranks), "WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes: list[BaseProcess] = []
        try:
            for rank in range(job.ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = self._context.Process(target=work, args=(str(job.folder), own), name=f"rank{rank}")
                process.start()
                processes.append(process)
            reason = _watch(processes, job, begin + job.timeout_s)
        finally:
            _end(processes)
        return CellOutcome(reason=reason, wall_s=time.monotonic() - begin)


def parent_environment(ranks: int) -> dict[str, str]:
    """What must be set before torch is imported."""
    return {
        **worker_environment(ranks),
        # Asking NVML whether there is a GPU, and not CUDA, keeps the parent free of a CUDA state that no fork survives.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A rank that was killed cannot give back its semaphores; the tracker does, and need not say so on the terminal.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    }


def worker_environment(ranks: int) -> dict[str, str]:
    """Threads of a rank, where its tools are, and the CPU accelerator where there is no GPU."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_here = os.environ.get("OMP_NUM_THREADS")
    environment = {"OMP_NUM_THREADS": set_here or str(max(1, usable // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    # DeepSpeed takes ninja from PATH; one of another version than last time would build all its ops anew.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        environment["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    if "DS_ACCELERATOR" not in os.environ and not Path("/dev/nvidia0").exists():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ensure_parent() -> None:
    from multiprocessing import forkserver

    forkserver.ensure_running()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """The terminal sends its interrupt to the parent of all ranks too, which ends with this process anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _watch(processes: list[BaseProcess], job: CellJob, deadline: float) -> str | None:
    """Wait until all ranks ended well (None), or one did not, or the time is up (why)."""
    running = list(processes)
    while running:
        ended = wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            late = ", ".join(p.name.removeprefix("rank") for p in running)
            return f"timed out after {job.timeout_s:g} s (rank {late} still running)"
        running = [p for p in running if p.sentinel not in ended]
        if any(p.exitcode for p in processes):
            settled = time.monotonic() + _SETTLE_S
            while time.monotonic() < settled and any(p.is_alive() for p in processes):
                time.sleep(0.02)
            codes = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
            return failure_reason(job.folder, codes)
    return None


def failure_reason(folder: Path, exit_codes: Mapping[int, int | None]) -> str:
    """Why a cell failed, in one line: of the ranks that ended badly, the one that did not merely lose its peer.

    Args:
        folder: the cell's, where ranks left their last exception.
        exit_codes: of the ranks that ended badly; negative is a signal.
    """
    told: list[tuple[bool, float, str]] = []
    for rank, code in exit_codes.items():
        try:
            failure = json.loads((folder / FAILURE_FILE.format(rank=rank)).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return (
                f"rank {rank}: {_death(code)}; last line of its log: {_last_line(folder / LOG_FILE.format(rank=rank))}"
            )
        line = str(failure["reason"])
        echo = any(word in line.lower() for word in ECHOES)
        told.append((echo, float(failure["time"]), f"rank {rank}: {line}"))
    return min(told)[2]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
        hint = ", out of memory perhaps" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exited with status {code}"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")


def _end(processes: list[BaseProcess]) -> None:
    """End what still runs: politely for a second, then not."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _TERMINATE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
