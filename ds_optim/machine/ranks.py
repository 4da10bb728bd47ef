"""The ranks of a run: joining them, and failing together.

A mistake that one rank meets alone (a file missing on one node, a full disk) must not leave the others
waiting in a collective: ``together`` runs a step on every rank and raises on all of them if it failed on any.
"""

from __future__ import annotations

import atexit
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ds_optim.errors import UserError
from ds_optim.machine import rendezvous
from ds_optim.machine.extensions import use_own_folder
from ds_optim.machine.meeting import Meeting, launched
from ds_optim.machine.reach import code_digest, unreachable

T = TypeVar("T")
_FILES = 256

# Set by the launchers that DeepSpeed can read ranks from without RANK and WORLD_SIZE.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

#: DeepSpeed's own.
DEFAULT_PORT = 29500
#: How long ranks may take to start and to find each other.
_JOIN_TIMEOUT_S = "300"
#: What an exception says that is but the loss of another rank.
_BROKEN = ("connection", "closed by peer", "timed out", "socket", "broken pipe", "no longer", "gloo", "nccl")


def join(
    meeting: Meeting | None = None,
    *,
    limit_s: float | None = None,
    check_code: bool = True,
    backend: str | None = None,
) -> None:
    """Join the process group through DeepSpeed; a process that no launcher started is a group of one.

    ``meeting`` is held before they ask each other anything. Raises UserError where a rank does not come within
    ``limit_s`` (None: the usual), where rank 0 cannot be reached or its port is in use, and, unless not ``check_code``,
    on every rank where one of them runs other code. ``backend``: of the group, where it is not to be the accelerator's.
    """
    import deepspeed

    meeting = meeting or Meeting()
    if dist.is_initialized() and deepspeed.comm.is_initialized():
        meeting.of_group()
        _settle()
        return
    if "RANK" not in os.environ and not any(name in os.environ for name in _MPI_VARIABLES):
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    accelerator = deepspeed.get_accelerator()
    check_device(accelerator)
    port = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT is {port!r}: give the launcher a port from 1 to 65535")
    _allow_files()
    use_own_folder()
    rendezvous.prepare()
    limit_s = join_timeout() if limit_s is None else limit_s
    problem = unreachable(os.environ, limit_s)
    if problem is not None:
        raise UserError(f"rank {os.environ['RANK']} on {socket.gethostname()}: {problem}")
    try:
        if told := launched():
            meeting.hold(limit_s)
        deepspeed.init_distributed(
            dist_backend=backend or accelerator.communication_backend_name(),
            # DeepSpeed's discovery of MPI ranks takes no port from the environment.
            distributed_port=int(port),
            verbose=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} of {socket.gethostname()} is in use: give the launcher another (--port N)"
        ) from None
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not told:  # an MPI has told DeepSpeed
        meeting.of_group()
    _settle()
    if check_code:
        same_code()


def _allow_files() -> None:
    """Let this process open as many files as its joining and its libraries need. Raises ``UserError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < _FILES:
            raise UserError(f"a process may open {most} files here, and a rank opens up to {_FILES}: raise ulimit -n")


def _settle() -> None:
    """Once every rank has come to the end of DeepSpeed's set-up, what it needed by name goes."""
    gather(None)
    rendezvous.settle()


def join_timeout() -> float:
    """Seconds that ranks may take to start and to find each other."""
    return float(os.environ.get("DS_OPTIM_JOIN_TIMEOUT", _JOIN_TIMEOUT_S))


def is_echo(error: BaseException) -> bool:
    """Whether an exception of this rank is but the loss of another one."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _BROKEN)


def check_device(accelerator: Any) -> None:
    """Raise UserError where this rank's accelerator is not there."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), accelerator.device_count()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or local + 1)
    if accelerator.device_name() != "cpu" and max(ranks_here, local + 1) > count:
        raise UserError(
            f"{ranks_here} ranks on {socket.gethostname()} need as many devices, and {accelerator.device_name()} has"
            f" {count}: start {count} or fewer on a node, or set DS_ACCELERATOR=cpu"
        )


def same_code() -> None:
    """Raise ``UserError`` on every rank, naming the node, unless all of them run the same code."""
    nodes = gather((socket.gethostname(), code_digest()))
    for rank, (node, digest) in enumerate(nodes):
        if digest != nodes[0][1]:
            raise UserError(
                f"rank {rank} on {node} has other code of ds_optim than rank 0 on {nodes[0][0]}:"
                " copy the same version to every node"
            )


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_at_once(status: int) -> None:
    """End a process that is one of several, without what destructors and threads would still ask of ranks that may be
    gone: they wait, or abort the process and so hide its status. Does nothing where it is the only one."""
    if world_size() > 1:
        _exit(status)


def end_together(status: int = 0) -> None:
    """End a process that is one of several and did its work: the group is left, MPI finalized, and what was registered
    for the end is called. The interpreter is not torn down: with gloo's threads alive that aborts one now and then
    (torch 2.13: in one of 46 runs of two ranks). Does nothing where it is the only one but leave the group."""
    alone = world_size() == 1
    leave()
    if alone:
        return
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    atexit._run_exitfuncs()
    _exit(status)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def expected() -> int:
    """How many ranks the launcher says there will be, before they have joined; 1 without a launcher."""
    sizes = (os.environ.get(name, "") for name in ("WORLD_SIZE", *_MPI_VARIABLES))
    return world_size() if dist.is_initialized() else int(next((size for size in sizes if size.isdecimal()), "1"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where this rank computes."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def together(step: Callable[[], T]) -> T:
    """``step()`` on every rank; where it fails on any rank, all of them raise."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:  # passed on below, once every rank knows
        failure = error
    lines = gather(None if failure is None else _line(failure))
    failed = [(index, line) for index, line in enumerate(lines) if line is not None]
    if not failed:
        return result  # type: ignore[return-value]
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    index, (is_user_error, line) = failed[0]
    if is_user_error:
        raise UserError(line)
    raise RuntimeError(f"rank {index} failed: {line}") from failure


def gather(value: Any) -> list[Any]:
    """One small picklable value of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Callable[[], T]) -> T:
    """What ``value()`` gives on rank 0, on every rank; an error there is an error everywhere."""
    result: T = gather(together(lambda: value() if rank() == 0 else None))[0]
    return result


def sums(values: list[float]) -> list[float]:
    """Each value summed over the ranks, in float64."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return [float(value) for value in total]


def same_everywhere(what: str, digest: str) -> None:
    """Raise ``UserError`` on every rank unless ``digest`` is the same on all of them."""
    digests = gather(digest)
    for other, value in enumerate(digests):
        if value != digests[0]:
            raise UserError(f"rank 0 and rank {other} disagree on {what}; start every rank with the same")


def _line(error: Exception) -> tuple[bool, str]:
    return isinstance(error, UserError), str(error) if isinstance(
        error, UserError
    ) else f"{type(error).__name__}: {error}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
