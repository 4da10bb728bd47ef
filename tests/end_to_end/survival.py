"""Runs of a model of a few thousand parameters, and ways to interfere with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .test_train import LION_MUON

FIRST_RELEASE = Path(__file__).parent.parent / "data" / "first_release"
STEPS = 6


def tiny(**changed: Any) -> dict[str, Any]:
    """Settings of a model of 4,696 parameters; its config is the fixture's."""
    given = {
        "model": "model",
        "seq_len": 16,
        "micro_batch": 2,
        "eval_batches": 1,
        "steps": STEPS,
        "dtype": "fp32",
        "stage": 2,
        **LION_MUON,
    }
    return {**given, **changed}


class Watcher:
    """An observer that calls a function after each step, and in each backward pass."""

    def __init__(
        self, after: Callable[[Any, int], None] | None = None, started: Callable[[Any], None] | None = None
    ) -> None:
        self.after, self.started = after, started

    def on_start(self, engine: Any) -> None:
        if self.started is not None:
            self.started(engine)

    def on_moment(self, engine: Any, moment: str) -> None:
        pass

    def on_step(self, engine: Any, step: int, loss: float, ms: float) -> None:
        if self.after is not None:
            self.after(engine, step)

    def on_end(self, engine: Any) -> None:
        pass


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
