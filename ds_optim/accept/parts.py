"""The parts of an acceptance, in the order in which they run: what each is, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ds_optim.accept.checks import AcceptSettings, Check


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part.

    what: in a line. minutes: that it may take where all parts may take ``MINUTES``. function: module and name, below
    this package, of (settings, a folder of its own) -> checks; imported where it runs.
    """

    what: str
    minutes: float
    function: tuple[str, str]

    def run(self, settings: AcceptSettings, folder: Path) -> Iterator[Check]:
        module, name = self.function
        function: Callable[[AcceptSettings, Path], Iterator[Check]] = getattr(
            import_module(f"ds_optim.accept.{module}"), name
        )
        return function(settings, folder)


PARTS: dict[str, Part] = {
    "kernels": Part(what="every kernel against the CPU", minutes=2, function=("kernels", "run")),
    "optimizers": Part(what="every optimizer at every stage", minutes=4.5, function=("optimizers", "run")),
    "memory": Part(what="memory against the estimate", minutes=2.5, function=("measured", "memory")),
    "step": Part(what="training steps", minutes=2.5, function=("measured", "step")),
    "polar": Part(what="orthogonalization", minutes=1, function=("measured", "polar")),
    "elementwise": Part(what="passes over flat tensors", minutes=1, function=("measured", "elementwise")),
    "wire": Part(what="bytes between ranks", minutes=1.5, function=("measured", "wire")),
}
MINUTES = sum(part.minutes for part in PARTS.values())
