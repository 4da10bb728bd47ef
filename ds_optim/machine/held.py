"""Signals that wait until a run can hear them: between a process's first moment and that one lies the import of torch.

They are held from the moment that this module is imported, as the package's first.
"""

from __future__ import annotations

import os
import signal
import sys

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""What asks a run to end."""
_PACKAGE = __name__.partition(".")[0]


def hold() -> None:
    """Keep them from this process until ``release``, where it is the command ``ds-optim train``; else do nothing."""
    if is_training() and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release() -> None:
    """Let this thread hear what was held back, here or by the script that started the process."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def is_training() -> bool:
    """Whether this process was started as ``ds-optim ... train ...`` or ``python -m ds_optim ... train ...``, as seen
    while the package is imported."""
    started, *arguments = sys.argv or [""]
    if started == "-m":
        module = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else 0
        ours = sys.orig_argv[module : module + 1] == [_PACKAGE]
    else:
        ours = os.path.basename(started) == "ds-optim"
    return ours and "train" in arguments


hold()
