"""Compile the C files of this folder with the machine's own C compiler, keep the result, and load it.

Where there is no compiler the eager path does the same to the bit, and one line says so. ``DS_OPTIM_NATIVE=0`` asks
for the eager path.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ds_optim.cache import cache_folder

logger = logging.getLogger("ds_optim")

_FOLDER = Path(__file__).parent
# No contraction of two roundings into one; the two others let loops be vectorized and change no value.
_FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not wanted or cannot be made, which is said once."""
    if os.environ.get("DS_OPTIM_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as problem:
        detail = getattr(problem, "stderr", None) or problem
        logger.warning(
            "ds_optim: no compiled CPU kernels: eager steps take 3 times as long, with narrow momentum more (%s)",
            detail,
        )
        return None


def is_available() -> bool:
    return library() is not None


def _compiled() -> Path:
    """The shared object, made if these sources have not been compiled on this kind of machine before."""
    compiler = _compiler()
    sources = sorted(_FOLDER.glob("*.c"))
    key = hashlib.sha256()
    for file in [*sources, *sorted(_FOLDER.glob("*.h"))]:
        key.update(repr((file.name, file.read_bytes())).encode())
    key.update(repr((compiler, _FLAGS, platform.machine(), _cpu())).encode())
    target = cache_folder() / f"kernels-{key.hexdigest()[:20]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Every rank may be here at once: each compiles its own, and the name changes hands in one move.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            subprocess.run(
                [compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(made), *map(str, sources), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            made.replace(target)
    return target


def _compiler() -> str:
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in wanted:
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError(f"no C compiler: none of {', '.join(wanted)} is on PATH")


def _cpu() -> str:
    """What the compiler's "native" is: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
