"""Why a write failed, whoever wrote."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

_FULL_BYTES = 1 << 20


def write_reason(error: BaseException, folder: Path) -> str:
    """Why a write failed, in a few words; torch's writer says little of a disk that is full."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return "No space left on device"
    return " ".join(str(error).split())[:160] or type(error).__name__
