"""The reference pretraining job: text in, a causal language model trained under ZeRO, a log out.

``train(settings)`` is the programmatic entry; ``ds-optim train`` is the same from the command line. Nothing
heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_optim.job.results import Observer, TrainResult
    from ds_optim.job.settings import TrainSettings
    from ds_optim.train.loop import train

__all__ = ["Observer", "TrainResult", "TrainSettings", "train"]

_HOMES = {
    "Observer": "ds_optim.job.results",
    "TrainResult": "ds_optim.job.results",
    "TrainSettings": "ds_optim.job.settings",
    "train": "ds_optim.train.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
