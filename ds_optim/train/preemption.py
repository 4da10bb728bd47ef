"""A signal that asks the run to end: noted when it comes, obeyed by all ranks at the next step border."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preemption:
    """Within the ``with`` block, SIGTERM and SIGUSR1 set ``asked`` to 1.0 and do nothing else.

    A handler that was installed outside of Python (a stack dumper's) stays, and outside of the main thread, where
    Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.asked = 0.0
        self._before: dict[Any, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not None:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = 1.0
