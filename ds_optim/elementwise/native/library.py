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
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ds_optim.elementwise.native import kept
from ds_optim.machine.cache import private_folder

logger = logging.getLogger("ds_optim")

_FOLDER = Path(__file__).parent
# No contraction of two roundings into one; the two others let loops be vectorized and change no value.
_FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_SECONDS = 120
_SCRATCH = "ds_optim-build-"
_KERNEL = re.compile(r"^void (ds_optim_\w+)\(", re.MULTILINE)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not wanted or cannot be made, which is said once."""
    if os.environ.get("DS_OPTIM_NATIVE", "1") == "0":
        return None
    try:
        return _loaded()
    except (OSError, subprocess.SubprocessError) as problem:
        detail = getattr(problem, "stderr", None) or problem
        logger.warning(
            "ds_optim: no compiled CPU kernels: eager steps take 3 times as long, with narrow momentum more (%s)",
            detail,
        )
        return None


def is_available() -> bool:
    return library() is not None


def _loaded() -> ctypes.CDLL:
    """The kernels that were kept, if these sources have been compiled on this kind of machine before; else new ones,
    kept if there is a place where nobody else can write.
    """
    compiler = _compiler()
    sources = sorted(_FOLDER.glob("*.c"))
    key = hashlib.sha256()
    for file in [*sources, *sorted(_FOLDER.glob("*.h"))]:
        key.update(repr((file.name, file.read_bytes())).encode())
    key.update(repr((compiler, _FLAGS, platform.machine(), _cpu())).encode())
    name = f"kernels-{key.hexdigest()[:20]}"
    symbols = [symbol for source in sources for symbol in _KERNEL.findall(source.read_text(encoding="utf-8"))]
    kept.sweep(Path(tempfile.gettempdir()), f"{_SCRATCH}*", 2 * _COMPILE_SECONDS)
    folder: Path | None = None
    try:
        folder = private_folder("kernels")
        found = kept.find(folder, name, symbols)
        if found is not None:
            return found
    except OSError as problem:
        _tell_unkept(problem)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch:
        made = Path(scratch) / f"{name}.so"
        _compile(compiler, sources, made)
        if folder is not None:
            try:
                made = kept.keep(made, folder)
            except OSError as problem:
                _tell_unkept(problem)
        return kept.opened(made, symbols)


def _tell_unkept(problem: OSError) -> None:
    logger.warning(
        "ds_optim: the CPU kernels are compiled anew at each start, they cannot be kept (%s); set DS_OPTIM_CACHE to a"
        " folder that you alone can write to",
        problem.strerror if problem.filename is None else f"{problem.filename}: {problem.strerror}",
    )


def _compile(compiler: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    subprocess.run(
        [*compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(target), *map(str, sources), "-lm"],
        check=True,
        capture_output=True,
        text=True,
        timeout=_COMPILE_SECONDS,
    )


def _compiler() -> list[str]:
    """The compiler's command: ``CC``, which may be several words, as make has it, or the path of one file."""
    named = os.environ.get("CC", "").strip()
    for command in [[named], _words(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise FileNotFoundError(f"no C compiler: none of {named or 'cc, gcc, clang'} is on PATH")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [command]
    except ValueError:  # a quotation that does not end
        return [command]


def _cpu() -> str:
    """What the compiler's "native" is: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
