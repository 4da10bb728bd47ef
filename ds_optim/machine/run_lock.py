"""One run a folder: a file that says who writes there, refused to others while that one lives."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

from ds_optim.errors import UserError
from ds_optim.machine.files import TEXT_LIMIT, Unreadable, read_json, short
from ds_optim.machine.locks import FileLock, LockWaitedFor

LOCK_NAME = "run.lock"
BEAT_S = 5.0
WATCH_S = 3 * BEAT_S
"""A holder on another machine that gives no sign of life in so long is dead."""
_BUSY_S = 60.0


class Holder(BaseModel):
    """The process that writes to a folder: ``started`` is when it began, by its own machine's clock."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    host: str = Field(max_length=255)
    place: str = Field(max_length=1000)
    pid: int = Field(gt=0, lt=2**31)
    started: float = Field(ge=0, lt=2**36)


class RunLock:
    """The right to write to a folder, for one process at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._own: Holder | None = None
        self._stop = threading.Event()

    def take(self, out: Path, instead: str = "give another --out, or end that run first") -> None:
        """Raises ``UserError`` where a living process has it, and ``OSError`` where the folder cannot be written."""
        path = out / LOCK_NAME
        own = _this_process()
        try:
            with FileLock(path, limit_s=_BUSY_S, sign=False):
                holder = _read(path)
                if holder is not None and holder != own and _is_running(holder, path):
                    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
                    raise UserError(
                        f"{out} is written to by process {holder.pid} on {short(holder.host)}, since {since}: {instead}"
                    )
                path.write_text(own.model_dump_json() + "\n", encoding="utf-8")
        except LockWaitedFor as waited:
            raise UserError(f"{waited}: another run starts in {out}; {instead}") from None
        self._path, self._own = path, own
        threading.Thread(target=self._refresh, daemon=True, name="ds_optim run lock").start()

    def release(self) -> None:
        """Give it back, if it is held."""
        self._stop.set()
        if self._path is not None and _read(self._path) == self._own:
            with suppress(OSError):
                self._path.unlink()
        self._path = None

    def _refresh(self) -> None:
        while not self._stop.wait(BEAT_S):
            path = self._path
            if path is not None:
                with suppress(OSError):
                    os.utime(path)


def _this_process() -> Holder:
    process = psutil.Process()
    return Holder(host=socket.gethostname(), place=_place(), pid=process.pid, started=process.create_time())


def _place() -> str:
    """Where process ids mean what they mean here: this boot of this machine, and this container of it."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) or socket.gethostname()


def _read(path: Path) -> Holder | None:
    """Who is named in the file; None where that cannot be told."""
    try:
        return read_json(path, Holder, TEXT_LIMIT)
    except Unreadable:
        return None


def _is_running(holder: Holder, path: Path) -> bool:
    """Whether the process is there, or where it cannot be seen from here, whether it gives a sign of life."""
    if holder.place == _place():
        try:
            return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
        except psutil.Error:
            return False
    last = path.stat().st_mtime_ns
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if path.stat().st_mtime_ns != last:
            return True
    return False
