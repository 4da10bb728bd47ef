"""The suite's options: `--gpus N` runs the ranks on N GPUs over NCCL and enables tests marked cuda; `--full` runs what
the default tier leaves out (tiers.py)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

from ds_optim.machine.cache import private_folder
from ds_optim.machine.extensions import use_own_folder
from tests.distributed import harness, server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpus",
        type=int,
        default=0,
        metavar="N",
        help="run ranks on N GPUs over NCCL (default: CPU over gloo); tests that need more are skipped",
    )
    parser.addoption("--full", action="store_true", help="all tests: minutes instead of 3 (tests/tiers.py)")


def pytest_configure(config: pytest.Config) -> None:
    gpus = config.getoption("--gpus")
    if gpus < 0:
        raise pytest.UsageError(f"--gpus {gpus}: write a number of GPUs, 0 for none")
    if config.getoption("--full"):
        os.environ["DS_OPTIM_FULL"] = "1"
        if "tests.tiers" in sys.modules and not sys.modules["tests.tiers"].FULL:
            raise pytest.UsageError("a conftest.py imports tests.tiers before --full is known: it would be the default")
    # DeepSpeed picks its accelerator at import, in this process too.
    os.environ["DS_ACCELERATOR"] = "cuda" if gpus else "cpu"
    # DeepSpeed's ops are built once a machine, not once a session.
    use_own_folder()
    # What somebody has measured on this machine must not decide how the suite orthogonalizes; the kernels are compiled
    # once a machine: each is kept under the digests of its source and of its content.
    fresh = tempfile.mkdtemp(prefix="ds_optim-tests-")
    with suppress(OSError):
        (Path(fresh) / "kernels").symlink_to(private_folder("kernels"))
    os.environ["DS_OPTIM_CACHE"] = fresh
    harness.configure(gpus)
    # How long an example takes says more of what else the machine does.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ.get("DS_OPTIM_CACHE", ""), ignore_errors=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("/unit/" not in item.nodeid for item in session.items):
        server.start(session.config.getoption("--gpus"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from tests.tiers import FULL  # which reads what pytest_configure has set

    left = [item for item in items if item.get_closest_marker("full") and not FULL]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]
    if config.getoption("--gpus"):
        return
    skip = pytest.mark.skip(reason="needs CUDA: run with --gpus N")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
