"""The summary of ``benchmarks.momentum_dtypes``: losses by seed, and how far their mean lies from float32's."""

from __future__ import annotations

import pytest

from benchmarks.momentum_dtypes import markdown, summarize
from ds_optim.report import Row


def run(dtype: str, seed: int, loss: float, **given: object) -> Row:
    fields = {"optimizer": "lion", "momentum_dtype": dtype, "seed": seed, "val_loss": loss, "train_loss": [1.0]}
    return Row(**{**fields, **given})  # type: ignore[arg-type]


def test_means_are_compared_over_the_seeds_that_both_have() -> None:
    rows = [run("float32", 0, 2.0), run("float32", 1, 3.0), run("int8", 0, 2.1), run("int8", 1, 3.0)]
    failed = run("int8", 2, 9.0, status="failed")
    exact, narrow = summarize([*rows, failed], {"date": "today"})
    assert exact.extra["change"] == 0
    assert narrow.val_loss == pytest.approx(2.55)
    assert narrow.extra["change"] == pytest.approx(2.55 / 2.5 - 1)
    assert narrow.extra["by_seed"] == {0: 2.1, 1: 3.0}
    assert narrow.extra["date"] == "today"
    assert narrow.train_loss == []
    assert "| lion | int8 | 2.1000 | 3.0000 | 2.5500 | +2.00% |" in markdown([exact, narrow])


def test_without_float32_there_is_no_change() -> None:
    (only,) = summarize([run("int8", 0, 2.0)], {})
    assert only.extra["change"] is None
