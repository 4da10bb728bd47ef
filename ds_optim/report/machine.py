"""What a result was measured on: parts and versions, no host names and no paths."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from ds_optim.matrix.dispatch import device_name

_PACKAGES = ("ds-optim", "torch", "deepspeed", "transformers")


def describe_machine() -> dict[str, str]:
    """CPU, cores, memory, GPUs and versions. Starts no CUDA context: workers will want the whole device."""
    described = {
        "CPU": device_name(torch.device("cpu")),
        "Cores": _cores(),
        "Memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": ", ".join(_gpu_names()) or "none",
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    return described


def _cores() -> str:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(total) if usable == total else f"{usable} of {total}"


def _gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, each kind once with its count."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = [line.strip() for line in found.splitlines() if line.strip()]
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
