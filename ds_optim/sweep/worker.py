"""One rank of a cell: it trains, measures, and rank 0 writes what all ranks measured.

Runs in a process forked by ``ds_optim.sweep.launch``, or as ``python -m ds_optim.sweep.worker FOLDER`` under any
launcher that sets RANK and WORLD_SIZE. It reads ``cell.json`` in FOLDER (the run's settings, and who
measures it); it leaves ``result.json`` there, a log per
rank, and the last exception of a rank that failed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_optim.job.settings import TrainSettings
    from ds_optim.sweep.measure import CellObserver
    from ds_optim.sweep.memory_measure import MemoryObserver

CELL_FILE = "cell.json"
RESULT_FILE = "result.json"
FAILURE_FILE = "rank{rank}.failure.json"
LOG_FILE = "rank{rank}.log"
BUILD_LOG = "build.log"
_REASON_CHARACTERS = 400


def work(folder: str, environment: Mapping[str, str]) -> None:
    """The life of a forked rank; it exits 0 if the cell's result is complete, else 1."""
    os.environ.update(environment)
    end_with_launcher()
    redirect(Path(folder) / LOG_FILE.format(rank=environment["RANK"]))
    status = run_rank(Path(folder))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down gloo after a failure waits for peers that are gone.
    os._exit(status)


def build_ops(folder: str, environment: Mapping[str, str], names: Sequence[str]) -> None:
    """Build these C++ ops of DeepSpeed for the CPU where they are not built yet; does nothing on other accelerators."""
    os.environ.update(environment)
    end_with_launcher()
    redirect(Path(folder) / BUILD_LOG)
    from deepspeed.accelerator import get_accelerator

    from ds_optim.machine.extensions import clear_left_overs, load_op

    if get_accelerator().device_name() == "cpu":
        clear_left_overs()
        for name in names:
            load_op(name)


def run_rank(folder: Path) -> int:
    """Train and measure one cell on this rank; returns the exit status, having written down why if it failed."""
    rank = rank_here()
    try:
        _train_and_measure(folder)
        return 0
    except BaseException as error:
        traceback.print_exc()
        failure = {"reason": reason_line(error), "time": time.time(), "node": socket.gethostname()}
        (folder / FAILURE_FILE.format(rank=rank)).write_text(json.dumps(failure), encoding="utf-8")
        return 1


def rank_here() -> int:
    """This rank's number as its launcher gave it; under MPI, DeepSpeed learns it later."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0")


def reason_line(error: BaseException) -> str:
    """An exception in one line of bounded length; a user's mistake without its class."""
    from ds_optim.errors import UserError

    text = " ".join(str(error).split())
    line = text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
    return line if len(line) <= _REASON_CHARACTERS else line[: _REASON_CHARACTERS - 1] + "…"


def _train_and_measure(folder: Path) -> None:
    import torch

    from ds_optim.job.settings import TrainSettings
    from ds_optim.machine import ranks
    from ds_optim.train.loop import train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    told = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
    settings = TrainSettings(**told["train"])
    observer = _observer(told["kind"], settings, told["options"], folder)
    result = train(settings, observer)
    if result.status:
        raise RuntimeError(f"the run was stopped before its end (status {result.status})")
    measured = ranks.gather(observer.measured())
    nodes = ranks.gather(socket.gethostname())
    if ranks.rank() == 0:
        record = {
            "val_loss": result.val_loss,
            "unigram_entropy": result.unigram_entropy,
            "losses": result.losses,
            "steps": result.steps,
            "skipped_steps": result.skipped_steps,
            "parameters": result.parameters,
            "ranks": measured,
            "nodes": nodes,
        }
        _write_whole(folder / RESULT_FILE, record)
    ranks.leave()


def _observer(
    kind: str, settings: TrainSettings, options: Mapping[str, Any], folder: Path
) -> CellObserver | MemoryObserver:
    """Who watches a cell of this kind of sweep."""
    if kind == "memory":
        from ds_optim.sweep.memory_measure import MemoryObserver

        return MemoryObserver(settings, folder=folder, **options)
    from ds_optim.sweep.measure import CellObserver

    return CellObserver(settings)


def _write_whole(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)


def redirect(log: Path) -> None:
    """Send this process's output to its log, that of C++ libraries too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def end_with_launcher() -> None:
    """End this process when the launching one ends: not even a killed ``compare`` leaves ranks behind."""
    # The terminal sends its interrupt to every process; ending ranks in order is the launcher's work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


def main(folder: Path) -> None:
    """The life of a rank that a launcher started; its log is in ``folder``, on whatever node it runs."""
    redirect(folder / LOG_FILE.format(rank=rank_here()))
    status = run_rank(folder)
    if status == 0:
        return  # in order, as MPI wants it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
