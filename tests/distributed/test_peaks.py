"""The peak of an engine's step, estimated and measured; ``benchmarks/peaks.py`` has all the cells."""

from __future__ import annotations

import pytest

from benchmarks.peaks import ALLOWED, RANKS, Engine, estimated, measure

from .harness import run_ranks

pytestmark = pytest.mark.full

#: Where what the model states are of decides, and where activations do.
SHAPES = ((32, 1), (256, 2))
ENGINES = (
    Engine(model="mixtral", stage=2, checkpointing=False),
    Engine(model="gpt2", stage=3, checkpointing=True),
    Engine(model="qwen3", stage=1, checkpointing=False, accumulation=2),
)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.model} z{engine.stage}")
def test_a_peak_is_within_five_percent(engine: Engine) -> None:
    ranks = run_ranks(RANKS, measure, engine, SHAPES, timeout=200)
    for number, (seq_len, micro_batch) in enumerate(SHAPES):
        kept, peak = estimated(engine, seq_len, micro_batch, "cpu")
        assert kept == pytest.approx(max(rank[number][0] for rank in ranks), rel=0.005)
        assert peak == pytest.approx(max(rank[number][1] for rank in ranks), rel=ALLOWED)
