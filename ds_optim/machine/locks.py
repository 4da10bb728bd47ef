"""A lock on a file that dies with its holder: it is the kernel's, and no file that somebody has to remove."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_POLL_S = 0.1
_TELL_AFTER_S = 3.0
#: What file systems say that know no such lock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LockWaitedFor(Exception):
    """The lock was not free in time; one line with the file and its holder."""


class FileLock:
    """A lock on ``path``, held by one process, or ``shared`` by several; where the file system has none, by nobody.

    Entering waits for ``limit_s`` seconds at most, polling, so that signals are heard; ``tell`` gets a line with the
    holder where that takes more than a moment. Raises ``LockWaitedFor`` after it, and ``OSError`` where the file
    cannot be made. Unless not ``sign``, the file says who holds it alone.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit_s: float,
        shared: bool = False,
        sign: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self._limit_s = limit_s
        self._shared = shared
        self._sign_it = sign
        self._tell = tell
        self._descriptor: int | None = None

    def __enter__(self) -> FileLock:
        while True:
            # Not followed where it is a link, and closed in what this process starts.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                self.change(shared=self._shared)
                if os.fstat(self._descriptor).st_ino == os.stat(self.path).st_ino:
                    return self
            except FileNotFoundError:
                pass  # its holder took the file away as it ended
            except BaseException:
                self._close()
                raise
            self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def change(self, *, shared: bool) -> None:
        """Hold it alone or shared from here on; in between it may have been another's."""
        assert self._descriptor is not None
        began, told = time.monotonic(), self._tell is None
        while not self._taken(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            waited = time.monotonic() - began
            if waited > self._limit_s:
                raise LockWaitedFor(f"{self.path} is held by {self._holder()} for more than {self._limit_s:g} s")
            if not told and waited > _TELL_AFTER_S:
                told = True
                assert self._tell is not None
                self._tell(f"waiting for {self._holder()}, which holds {self.path}")
            time.sleep(_POLL_S)
        if self._sign_it and not shared:
            self._sign()

    def _taken(self, how: int) -> bool:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _sign(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _holder(self) -> str:
        assert self._descriptor is not None
        return os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
