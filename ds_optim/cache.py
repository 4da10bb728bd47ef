"""Where this package keeps what it has made or measured on a machine."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``$DS_OPTIM_CACHE``, else ``ds_optim`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet.

    For a user without a home, a folder of the user's own among the temporary files.
    """
    own = os.environ.get("DS_OPTIM_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "ds_optim"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"ds_optim-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def read_table(path: Path, version: int) -> dict[str, Any]:
    """A table of measurements, {"version": ..., "devices": {NAME: {...}}}.

    Raises:
        OSError: there is none. ValueError: it is none of this version.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.get("version") != version or not isinstance(table.get("devices"), dict):
        raise ValueError(f"it is no table of version {version}")
    return table


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table in one move: a reader sees the old one or the new one. OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1, allow_nan=False)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
