"""The dispatch table that a user has measured: where on a device and in a dtype the Gram form wins.

``ds-optim bench polar --store`` writes it, one JSON file in the user's cache folder for all devices:

    {"version": 1, "devices": {NAME: {"bfloat16": {"gram_from": 1.6, ...}}}}

``gram_from`` is the long side / short side above which the Gram form is the faster one; null where it never is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_optim.cache import cache_folder

logger = logging.getLogger("ds_optim")

VERSION = 1


def table_path() -> Path:
    """Where the table lies: ``polar.json`` in the package's cache folder."""
    return cache_folder() / "polar.json"


def device_name(device: torch.device) -> str:
    """The name that a device's measurements stand under: the GPU's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def gram_from(device: torch.device, dtype: str) -> float | None:
    """The measured aspect for ``device`` and ``dtype`` (float32, bfloat16, float16), infinity where the Gram form
    never wins; None where nothing was measured. A table that cannot be read counts as none, and a line says so.
    """
    path = table_path()
    try:
        entry = _read(path)["devices"].get(device_name(device), {}).get(dtype)
        if entry is None:
            return None
        found = entry["gram_from"]
        return math.inf if found is None else float(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        logger.warning("ds_optim: the dispatch table %s cannot be read (%s); remove it or measure anew", path, problem)
        return None


def store(device: torch.device, measured: Mapping[str, Mapping[str, Any]]) -> Path:
    """Keep what was measured for ``device``, by dtype; other devices and dtypes stay. Returns the table's path.

    The file changes in one move: a reader sees the old table or the new one. OSError where it cannot be written.
    """
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = _read(path)
    except (OSError, ValueError, KeyError, TypeError):
        table = {"version": VERSION, "devices": {}}
    table["devices"].setdefault(device_name(device), {}).update({dtype: dict(e) for dtype, e in measured.items()})
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1, allow_nan=False)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def _read(path: Path) -> dict[str, Any]:
    """The table; ValueError where it is none of this version."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.get("version") != VERSION or not isinstance(table.get("devices"), dict):
        raise ValueError(f"it is no table of version {VERSION}")
    return table
