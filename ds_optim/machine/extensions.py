"""DeepSpeed's C++ ops, built once where no build that was killed can stop a later one.

torch builds an extension under a file ``lock`` beside it, which a killed build leaves behind and at which every later
one waits for ever. Here builds stand under a lock that dies with its holder, and so a ``lock`` that is there while we
hold ours alone belongs to nobody, or to a process that does not know of ours: that one has the file open.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from ds_optim.errors import UserError
from ds_optim.machine.cache import cache_folder, private_folder
from ds_optim.machine.locks import FileLock, LockWaitedFor

VARIABLE = "TORCH_EXTENSIONS_DIR"
OWN_LOCK = ".ds_optim.lock"
BATON = "lock"
"""What torch calls its own."""
BUILD_S = 900.0
_POLL_S = 0.2
_SHARED_BY_MACHINES = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "beegfs", "glusterfs", "fuse.", "9p", "pvfs")


def say(line: str) -> None:
    """A line for the user, on any rank."""
    print(f"ds-optim: {line}", file=sys.stderr, flush=True)


def use_own_folder() -> None:
    """Unless the user says where extensions are built, let it be a folder of ours for these versions and this machine's
    kind; where none can be made that others cannot write to, torch's own."""
    if os.environ.get(VARIABLE):
        return
    try:
        os.environ[VARIABLE] = str(private_folder(f"torch_extensions/{_kind()}"))
    except OSError as problem:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"DeepSpeed's ops are built where torch builds: {problem.strerror or problem}")


def load_op(builder: str, limit_s: float = BUILD_S) -> None:
    """Load one of DeepSpeed's ops into this process, built if it is not; a build that fails is DeepSpeed's to tell.

    Raises:
        UserError: a process that builds it does not end in ``limit_s``, or a ``lock`` cannot be taken for a dead one's.
    """
    from deepspeed.accelerator import get_accelerator

    made = get_accelerator().create_op_builder(builder)
    if made is None or not hasattr(made, "load"):
        return

    def load() -> None:
        # What needs the op loads it again, and then shows why it does not build.
        with suppress(Exception):
            made.load(verbose=False)

    if made.name in type(made)._loaded_ops:
        load()
    else:
        guarded(_root(), made.name, load, limit_s)


def guarded(root: Path, name: str, load: Callable[[], None], limit_s: float = BUILD_S) -> None:
    """``load()`` the extension ``name`` under ``root``: by one process where it is to be built, else by all at once.

    Raises ``UserError`` as ``load_op`` does.
    """
    folder = root / name
    try:
        with FileLock(root / OWN_LOCK, limit_s=limit_s, shared=True, tell=say) as lock:
            if not _ready(folder):
                lock.change(shared=False)
                clear(folder, limit_s)
                if not _built(folder):
                    say(f"building DeepSpeed's op {name} in {root}, once; this takes a minute or two")
                    load()
                    return
                lock.change(shared=True)
            load()
    except LockWaitedFor as waited:
        raise UserError(f"{waited}: it builds DeepSpeed's op {name}; end it, or wait for it, and start again") from None
    except OSError:
        # A folder that is only read: nothing is built there, and nobody builds there.
        load()


def clear_left_overs() -> None:
    """Remove every ``lock`` that a killed build left where extensions are built, and say so.

    Raises ``UserError`` where one may still be somebody's.
    """
    root = _root()
    if not any(True for _ in root.glob(f"*/{BATON}")):
        return
    try:
        with FileLock(root / OWN_LOCK, limit_s=BUILD_S, tell=say):
            for left in sorted(root.glob(f"*/{BATON}")):
                clear(left.parent, BUILD_S)
    except LockWaitedFor as waited:
        raise UserError(f"{waited}: it builds an extension; end it, or wait for it, and start again") from None
    except OSError:
        return


def clear(folder: Path, limit_s: float) -> None:
    """Wait for who holds torch's ``lock`` in ``folder``, and remove it where nobody does; ours is held alone."""
    baton = folder / BATON
    deadline, told = time.monotonic() + limit_s, False
    while baton.exists():
        holder = _who_has_open(baton)
        if holder is None:
            if not _is_ours(baton):
                raise UserError(
                    f"{baton} is the lock of a build that this machine does not know: if none runs on another one,"
                    f" remove that file; or set {VARIABLE} to another folder"
                )
            say(f"removed {baton}, which a killed build left behind")
            baton.unlink(missing_ok=True)
            return
        if time.monotonic() > deadline:
            raise UserError(f"process {holder} holds {baton} for more than {limit_s:g} s: end it, and start again")
        if not told:
            told = True
            say(f"waiting for process {holder}, which builds in {folder}")
        time.sleep(_POLL_S)


def _kind() -> str:
    """Names what a built library depends on beside its source."""
    names = [f"py{sys.version_info.major}.{sys.version_info.minor}", platform.machine()]
    for package in ("torch", "deepspeed"):
        with suppress(PackageNotFoundError):
            names.append(f"{package}{version(package)}")
    return "-".join(names)


def _root() -> Path:
    """Where extensions are built; made, where that can be."""
    from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

    named = os.environ.get(VARIABLE)
    try:
        root = Path(named) if named else Path(_get_build_directory("deepspeed", False)).parent
    except OSError:  # which makes the folder: where it cannot, as in a home that is only read, nothing is built
        root = Path(get_default_build_root())
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    return root


def _built(folder: Path) -> bool:
    return any(folder.glob("*.so"))


def _ready(folder: Path) -> bool:
    return _built(folder) and not (folder / BATON).exists()


def _who_has_open(path: Path) -> int | None:
    """A process of this machine that has the file open."""
    try:
        wanted = path.stat()
    except OSError:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    found = descriptor.stat()
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        return int(process.name)
    return None


def _is_ours(baton: Path) -> bool:
    """Whether no process but this user's on this machine, or one that takes our lock, can have made the file."""
    if cache_folder() in baton.parents:
        return True
    with suppress(OSError):
        return baton.stat().st_uid == os.geteuid() and not _shared_by_machines(baton)
    return False


def _shared_by_machines(path: Path) -> bool:
    kinds = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    kind = next((kinds[parent] for parent in resolved.parents if parent in kinds), "")
    return kind.startswith(_SHARED_BY_MACHINES)
