"""One rank of a cell: it trains, measures, and rank 0 writes what all ranks measured.

Runs in a process forked by ``ds_optim.sweep.launch``, or as ``python -m ds_optim.sweep.worker FOLDER`` under any
launcher that sets RANK and WORLD_SIZE. It reads ``cell.json`` in FOLDER (the run's settings, and who measures it); it
leaves ``result.json`` there, a log per rank, and the last exception of a rank that failed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_optim.machine.child import LOG_FILE, begin, leave, reason_line, redirect

if TYPE_CHECKING:
    from ds_optim.job.settings import TrainSettings
    from ds_optim.sweep.measure import CellObserver
    from ds_optim.sweep.memory_measure import MemoryObserver

CELL_FILE = "cell.json"
RESULT_FILE = "result.json"
FAILURE_FILE = "rank{rank}.failure.json"


def work(environment: Mapping[str, str], folder: str) -> None:
    """The life of a forked rank; it exits 0 if the cell's result is complete, else 1."""
    begin(environment, Path(folder) / LOG_FILE.format(rank=environment["RANK"]))
    leave(run_rank(Path(folder)))


def run_rank(folder: Path) -> int:
    """Train and measure one cell on this rank; returns the exit status, having written down why if it failed."""
    try:
        _train_and_measure(folder)
        return 0
    except BaseException as error:
        traceback.print_exc()
        failure = {"reason": reason_line(error), "time": time.time(), "node": socket.gethostname()}
        (folder / FAILURE_FILE.format(rank=_rank_here())).write_text(json.dumps(failure), encoding="utf-8")
        return 1


def _rank_here() -> int:
    """This rank's number as its launcher gave it; under MPI, DeepSpeed learns it later."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0")


def _train_and_measure(folder: Path) -> None:
    import torch

    from ds_optim.job.settings import TrainSettings
    from ds_optim.machine import ranks
    from ds_optim.machine.files import write_atomic
    from ds_optim.machine.plugins import load_plugins
    from ds_optim.sweep.result import CellResult
    from ds_optim.train.loop import train

    load_plugins()
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
        record = CellResult.of(result, measured, nodes)
        write_atomic(folder / RESULT_FILE, record.model_dump_json())


def _observer(
    kind: str, settings: TrainSettings, options: Mapping[str, Any], folder: Path
) -> CellObserver | MemoryObserver:
    """Who watches a cell of this kind of sweep."""
    if kind == "memory":
        from ds_optim.sweep.memory_measure import MemoryObserver

        return MemoryObserver(settings, folder=folder, **options)
    from ds_optim.sweep.measure import CellObserver

    return CellObserver(settings)


def main(folder: Path) -> None:
    """The life of a rank that a launcher started; its log is in ``folder``, on whatever node it runs."""
    redirect(folder / LOG_FILE.format(rank=_rank_here()))
    status = run_rank(folder)
    if status:
        leave(status)
    from ds_optim.machine import ranks

    ranks.end_together()  # as MPI wants it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
