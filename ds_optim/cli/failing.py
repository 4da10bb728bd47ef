"""A command that fails says one line, and exits with a status that scripts can read."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn


def fail(line: str, status: int = 2) -> NoReturn:
    """Print one line on stderr, once for all ranks of a node, and exit, with status 2 for a user's mistake."""
    from ds_optim.machine.said import is_first_to_say

    line = " ".join(line.split())
    if is_first_to_say(line):
        print(f"ds-optim: error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def limit_met(error: Exception) -> str | None:
    """What to do where a limit of the shell or the machine stopped this process; None where it was something else."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: raise the limit (ulimit -n) and start again"
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if allocator or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "there is not enough memory for this (ulimit -v limits it too): raise the limit, or run a smaller one"
    return None
