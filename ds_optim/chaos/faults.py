"""Faults for ``ds-optim chaos``: where in a run a rank is killed, stopped or told to end, or differs, and who does it.

They reach a run as any observer does, in code: nothing in the training itself knows of them.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils._python_dispatch import TorchDispatchMode

from ds_optim.chaos.start import START_POINTS
from ds_optim.job.results import Moment
from ds_optim.job.settings import TrainSettings

Kind = Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP", "hang", "disk full", "differs", "waits"]
Place = Literal["start", "backward", "exchange", "save", "forward"]

#: The points of a save: (the moment, how often it came before, what the table says).
SAVE_POINTS: tuple[tuple[Moment, int, str], ...] = (
    ("file written", 0, "after a rank's first file"),
    ("file written", 1, "after a rank's next file"),
    ("files written", 0, "after all files"),
    ("sealed", 0, "after the manifest"),
    ("latest moved", 0, "after latest"),
)
#: What differs on one rank, and what the line that refuses it names.
DIFFERENCES: tuple[tuple[str, str], ...] = (
    ("its settings", "the settings"),
    ("a number of its optimizer", "weight_decay of parameter group"),
    ("its optimizer's seed", "seed of parameter group"),
)
BALLAST = "ballast"
GO = "go"
"""The file for which ``waits`` waits, in the attempt's folder."""
_SHORTEST_WRITE = 512


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to ``rank`` from ``step`` on, the first time it comes by ``place``.

    ``count`` tells the place closer: of a save an index into ``SAVE_POINTS``, in backward the parameter, of the
    exchange twice the number of the message, and 1 for after it; at the start an index into
    ``ds_optim.chaos.start.START_POINTS``, or of what differs into ``DIFFERENCES``.
    ``torn``: before the kill the file written last loses its second half, as in a write under way.
    """

    kind: Kind
    place: Place
    rank: int
    step: int
    count: int = 0
    torn: bool = False

    @property
    def where(self) -> str:
        if self.kind == "differs":
            return DIFFERENCES[self.count][0]
        if self.place == "start":
            return f"start, {START_POINTS[self.count].where}"
        if self.place == "save":
            return f"save, {'in a file' if self.torn else SAVE_POINTS[self.count][2]}"
        return self.place


class Saboteur:
    """An observer that commits a fault (None: none), and writes down what its rank saw.

    Each line of ``rankR.seen`` in ``folder`` is an event: ``resumed STEP``, ``loss STEP HEX``, ``sealed STEP``,
    ``fired TIME``. Lines are whole when ``write`` returns, so a killed rank's are too. ``fault`` is None when it fired.
    """

    def __init__(self, folder: Path, out: Path | None, rank: int, fault: Fault | None) -> None:
        self.fault = fault if fault is not None and fault.rank == rank else None
        self._folder = folder
        self._seen = os.open(folder / f"rank{rank}.seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._out = out
        self._step = 0
        self._came = 0
        self._exchange = _Exchange(self) if self.fault and self.fault.place == "exchange" else None

    def on_start(self, engine: Any) -> None:
        """Note where the run starts, and lie in wait in its backward pass."""
        self._step = int(engine.global_steps) + 1
        self._note(f"resumed {engine.global_steps}")
        if self.fault is not None and self.fault.place == "backward":
            parameters = [p for p in engine.module.parameters() if p.requires_grad]
            chosen = parameters[self.fault.count % len(parameters)]
            chosen.register_hook(lambda gradient: self.strike() if self._armed() else None)
        if self.fault is not None and self.fault.kind == "differs" and self.fault.place == "start":
            self._differ(engine)

    def on_moment(self, engine: Any, moment: Moment) -> None:
        """Strike where the fault lies in a save, a forward pass, or in what follows a backward pass."""
        if moment == "sealed":
            self._note(f"sealed {self._step - 1}")
        if moment == "after backward" and self._exchange is not None and self._armed():
            self._exchange.__enter__()
        if self.fault is None or not self._armed():
            return
        if self.fault.place == "forward" and moment == "after forward":
            if self.fault.kind == "differs":
                self._differ(engine)
            else:
                self.strike()
        elif self.fault.place == "save" and moment == SAVE_POINTS[self.fault.count][0]:
            if self._came == SAVE_POINTS[self.fault.count][1]:
                self.strike()
            self._came += 1

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        self._note(f"loss {step} {loss.hex()}")
        self._step = step + 1
        if self._exchange is not None:
            self._exchange.leave()

    def on_end(self, engine: Any) -> None:
        self._note("ended")

    def strike(self) -> None:
        """Commit the fault; a kill does not return."""
        fault = self.fault
        assert fault is not None
        if fault.torn:
            self._tear()
        self._fired()
        if fault.kind == "hang":
            time.sleep(3600)
        elif fault.kind == "waits":
            while not (self._folder / GO).exists():
                time.sleep(0.02)
        elif fault.kind == "disk full":
            self._fill_disk()
        else:
            os.kill(os.getpid(), getattr(signal, fault.kind))

    def changed(self, settings: TrainSettings) -> TrainSettings:
        """The settings of this rank."""
        if self.fault is None or self.fault.kind != "differs" or self.fault.count:
            return settings
        self._fired()
        return settings.model_copy(update={"seed": settings.seed + 1})

    def _differ(self, engine: Any) -> None:
        assert self.fault is not None
        key = DIFFERENCES[self.fault.count][1].split()[0]
        self._fired()
        for group in engine.optimizer.param_groups:
            group[key] = group[key] + 1

    def _fired(self) -> None:
        self.fault = None
        self._note(f"fired {time.time()}")

    def _armed(self) -> bool:
        # A save comes after its step was counted.
        offset = 1 if self.fault is not None and self.fault.place == "save" else 0
        return self.fault is not None and self._step - offset >= self.fault.step

    def _tear(self) -> None:
        assert self._out is not None
        files = sorted(self._out.glob("checkpoints/step-*/*.pt"), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(files[-1], files[-1].stat().st_size // 2)

    def _fill_disk(self) -> None:
        assert self._out is not None
        with (self._out / BALLAST).open("ab", buffering=0) as file:
            size = 1 << 20
            while size >= _SHORTEST_WRITE:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def _note(self, line: str) -> None:
        os.write(self._seen, f"{line}\n".encode())


class _Exchange(TorchDispatchMode):
    """Strikes at a message of the optimizer's step: an even count before it, an odd one after it."""

    def __init__(self, saboteur: Saboteur) -> None:
        super().__init__()
        self._saboteur = saboteur
        self._entered = False
        self._messages = 0

    def __enter__(self) -> Any:
        self._entered = True
        return super().__enter__()

    def leave(self) -> None:
        """Stop watching, if it does."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fault = self._saboteur.fault
        hit = False
        if fault is not None and func.namespace == "c10d":
            hit = self._messages == fault.count // 2
            self._messages += 1
        if hit and fault is not None and fault.count % 2 == 0:
            self._saboteur.strike()
        result = func(*args, **(kwargs or {}))
        if hit and fault is not None and fault.count % 2 == 1:
            self._saboteur.strike()
        return result
