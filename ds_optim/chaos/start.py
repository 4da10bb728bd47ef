"""The moments of a run's start for ``ds-optim chaos``: calls that the set-up of a run makes, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """The call of ``name`` by ``module``, what the table says of it, and what the ranks that are left say."""

    module: str
    name: str
    where: str
    told: str = "rank {rank} "


_RANKS = "ds_optim.machine.ranks"
#: In their order. Before the second, ranks that end are not known by their number.
START_POINTS = (
    StartPoint(module=_RANKS, name="join", where="before the ranks join", told="for rank {rank} to join"),
    StartPoint(module="deepspeed", name="init_distributed", where="as DeepSpeed joins them"),
    StartPoint(module=_RANKS, name="same_code", where="as the ranks join"),
    StartPoint(module="ds_optim.train.loop", name="to_resume", where="the look at checkpoints"),
    StartPoint(module="ds_optim.train.loop", name="load_data", where="the text"),
    StartPoint(module="ds_optim.train.loop", name="start_engine", where="the engine"),
    StartPoint(module="ds_optim.survival.checkpoint", name="load", where="the load of the checkpoint"),
)
JOINED = 1
"""From this point on the ranks are watched, and end together."""


@contextmanager
def at_start(point: StartPoint | None, strike: Callable[[], None]) -> Iterator[None]:
    """``strike`` at a point of the start of the run within the block."""
    if point is None:
        yield
        return
    module = import_module(point.module)
    call = getattr(module, point.name)

    def struck(*arguments: Any, **options: Any) -> Any:
        strike()
        return call(*arguments, **options)

    setattr(module, point.name, struck)
    try:
        yield
    finally:
        setattr(module, point.name, call)
