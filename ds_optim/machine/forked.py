"""Ranks of this machine, forked from one parent that has imported what they need.

Importing torch, DeepSpeed and transformers takes many times as long as a short run, so all ranks are forked from a
parent that imported them once (``forkserver``). That parent runs no thread, no OpenMP region and no CUDA call, so a
fork of it is a clean process: each run still has its own processes and its own process group.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ds_optim.errors import UserError
from ds_optim.machine.child import build_ops
from ds_optim.machine.extensions import use_own_folder

BUILD_LOG = "build.log"
#: Imported once, by the parent of all ranks. Every ZeRO engine imports Muon's module, which takes seconds by itself.
_PRELOAD = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.qwen3.modeling_qwen3",
)
_TERMINATE_S = 1.0
_BUILD_S = 900.0
#: More processes than this on a machine's cores are a typing error, and would take all of its memory.
_RANKS_A_CORE, _LEAST_MOST_RANKS = 8, 64
_COLLECTIVES_OP = "ShareMemCommBuilder"
_ADAM_OP = "FusedAdamBuilder"


class ForkedRanks:
    """Starts processes of this machine. Making it starts the importing parent, which is ready when the first run is.

    Args:
        ranks: processes of a run; each computes with an equal share of the cores.
        preload: modules that the parent imports, besides torch, DeepSpeed and the presets' model.
        fixed: environment variables of all of them.
        one_device: they share the first accelerator, as no NCCL can: their group's backend must be gloo.
    """

    def __init__(
        self,
        ranks: int,
        preload: Sequence[str],
        fixed: Mapping[str, str] | None = None,
        *,
        one_device: bool = False,
    ) -> None:
        self._ranks = ranks
        self._fixed = fixed or {}
        self._one_device = one_device
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_PRELOAD, *preload])
        use_own_folder()
        with _set({**_parent_environment(ranks), **self._fixed}), _without_interrupts():
            forkserver.ensure_running()

    def build_ops(self, folder: Path, optimizers: Sequence[str]) -> None:
        """Build the C++ ops that DeepSpeed builds at first use on a CPU, before ranks race for it; once a machine.

        A build that fails is not an error here: what needs the op will say so. Its log is in ``folder``.
        """
        ops = [_COLLECTIVES_OP] + [_ADAM_OP] * any(name.lower().endswith(("adam", "adamw")) for name in optimizers)
        arguments = (worker_environment(1), str(folder / BUILD_LOG), ops)
        process = self._context.Process(target=build_ops, args=arguments, name="build")
        process.start()
        try:
            process.join(_BUILD_S)
        finally:
            end([process])

    def start(self, function: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]]) -> list[BaseProcess]:
        """``function(environment, *arguments(rank))`` in a process for each rank; its first call is ``child.begin``."""
        size = str(self._ranks)
        local_size = "1" if self._one_device else size
        shared = {**worker_environment(self._ranks), **self._fixed, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes: list[BaseProcess] = []
        try:
            for rank in range(self._ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": "0" if self._one_device else str(rank)}
                process = self._context.Process(target=function, args=(own, *arguments(rank)), name=f"rank{rank}")
                process.start()
                processes.append(process)
        except BaseException:
            end(processes)
            raise
        return processes


def end(processes: Sequence[BaseProcess]) -> None:
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


def usable_gpus() -> int:
    """How many GPUs ranks of this machine will compute on: none where DeepSpeed is told to take the CPU."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def check_ranks(ranks: int) -> None:
    """Raise UserError where so many ranks cannot run on this machine."""
    gpus = usable_gpus()
    most = max(_LEAST_MOST_RANKS, _RANKS_A_CORE * (os.cpu_count() or 1))
    if ranks < 1:
        raise UserError(f"--ranks: {ranks} is too few; write 1 or more")
    if gpus and ranks > gpus:
        raise UserError(
            f"--ranks: {ranks} ranks need as many GPUs and there are {gpus}; write {gpus} or fewer, or set "
            "DS_ACCELERATOR=cpu"
        )
    if ranks > most:
        raise UserError(f"--ranks: {ranks} ranks are too many for this machine's cores; write {most} or fewer")


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


def _parent_environment(ranks: int) -> dict[str, str]:
    """What must be set before torch is imported."""
    return {
        **worker_environment(ranks),
        # Asking NVML whether there is a GPU, and not CUDA, keeps the parent free of a CUDA state that no fork survives.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A rank that was killed cannot give back its semaphores; the tracker does, and need not say so on the terminal.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    }


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
def _set(values: Mapping[str, str]) -> Iterator[None]:
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
