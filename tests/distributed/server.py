"""The parent that ranks are forked from: started once per session, in an environment of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

WARM_UP_SECONDS = 600.0
"""The first fork server of a machine compiles DeepSpeed's C++ op; no test's own limit pays for it."""


@cache
def start(gpus: int) -> None:
    """Start the fork server and do not wait for its imports (once per session, before anything else starts one: a
    process has one server, and one without these imports would have every rank do them)."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([f"{__package__}.preload", "pytest"])
    with _server_environment(gpus):
        forkserver.ensure_running()


@cache
def warm_up(gpus: int) -> None:
    """Start the fork server and wait until its imports are done (once per session)."""
    start(gpus)
    process = multiprocessing.get_context("forkserver").Process(target=_nothing)
    process.start()
    process.join(WARM_UP_SECONDS)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"the parent of the ranks was not ready in {WARM_UP_SECONDS:g} s")


def _nothing() -> None:
    """The warm-up's job: done when the server has finished its imports and forks."""


@contextlib.contextmanager
def _server_environment(gpus: int) -> Iterator[None]:
    """The environment that the fork server, and so every rank, starts with."""
    # PYTHONPATH, because the server does not take over sys.path before it preloads.
    settings = {
        # The ninja that builds DeepSpeed's ops stands beside python, activated or not; another
        # version of it would not trust the build's log and compile all anew.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
        # CUDA must not be touched before the fork, not even to ask whether it is there.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    if not gpus:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
