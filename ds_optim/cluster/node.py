"""What a node says of itself before a run: versions, code, room on its disks, and its network's name."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_optim.machine.reach import code_digest

_GIB = 2**30
#: What a checkpoint of a model of some size wants at least, and what NCCL and gloo want of /dev/shm.
DISK_GIB = 5.0
SHM_GIB = 0.5
_PACKAGES = ("torch", "deepspeed", "ds-optim", "transformers", "datasets")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def node_facts(out: Path, config: Path | None) -> dict[str, Any]:
    """The facts of the node that this rank runs on, as JSON.

    ``versions`` maps a name to a version, ``digests`` what must be the same on every node to its hash, ``todo`` lists
    (what, line) of what must be done on this node.
    """
    return {
        "node": socket.gethostname(),
        "versions": _versions(),
        "digests": {"code": code_digest(), **({} if config is None else {"config": file_digest(config)})},
        "disk_gib": _free_gib(out),
        "shm_gib": _free_gib(Path("/dev/shm")),
        "todo": [list(found) for found in (*_room(out), *network_problems(os.environ, socket.gethostname()))],
    }


def file_digest(path: Path) -> str:
    """A hash of a file, or why there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return f"{error.strerror}"


def network_problems(environment: Mapping[str, str], hostname: str) -> list[tuple[str, str]]:
    """What would keep this node's ranks from finding the others, seen without them."""
    problems = []
    here = [name for _, name in socket.if_nameindex()]
    for variable in _INTERFACES:
        wanted = environment.get(variable, "").lstrip("^=")
        names = [part.partition(":")[0] for part in wanted.split(",") if part]
        if names and not any(any(name.startswith(part) for name in here) for part in names):
            line = (
                f"{variable}={wanted}, and {hostname} has only {', '.join(here)}: set it to an interface of every node"
            )
            problems.append(("interface", line))
    return problems


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    import torch

    found["driver"] = _driver()
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        found["GPU"] = torch.cuda.get_device_name(0)
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "not answering"
    return text.split()[0] if text.split() else "none"


def _free_gib(folder: Path) -> float | None:
    """Free space of the file system of ``folder``, or of the nearest folder above it that is there."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free / _GIB
        except OSError:
            continue
    return None


def _room(out: Path) -> list[tuple[str, str]]:
    problems = []
    disk, shm = _free_gib(out), _free_gib(Path("/dev/shm"))
    if disk is None or disk < DISK_GIB:
        problems.append(("disk", f"{disk or 0:.1f} GiB free for {str(out)!r}: make room, or give --out another folder"))
    if shm is not None and shm < SHM_GIB:
        remedy = "start the container with --shm-size=8g, or remount /dev/shm larger"
        problems.append(("shared memory", f"{shm:.2f} GiB free in /dev/shm: {remedy}"))
    return problems
