"""Gradients at the edges of their type: a matrix without any, and one so large that its square or its sum overflows.

A step is either skipped on all ranks, and moves nothing, or taken by all, and leaves weights and momentum finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.matrix.shapes import POLAR
from ds_optim.optimizers import OPTIMIZERS
from tests.cases import CASES

from .harness import run_ranks
from .small_runs import Cell, differences, equal, full_weights, one_step, own_optimizer, snapshot, start

pytestmark = pytest.mark.full

MATRIX = "tall.weight"
_FP32 = {"polar": {"steps": 3, "dtype": "float32"}}


def settings_of(name: str, **params: Any) -> dict[str, Any]:
    spectral = _FP32 if CASES[name].rule.shape is POLAR else {}
    return {"type": name, "params": {"lr": 1e-2, **spectral, **params}}


def not_finite(engine: Any) -> list[str]:
    held = snapshot(engine)
    return [
        name
        for name, value in held.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()
    ]


def spoil(engine: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the gradient of ``MATRIX`` in every backward; returns the hook."""
    return dict(engine.module.named_parameters())[MATRIX].register_hook(change)


# ---- no gradient for a whole matrix


def zero_gradients(rank: int, world_size: int, cells: list[tuple[str, Cell]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, cell in cells:
        engine = start(cell, world_size, settings_of(name, weight_decay=0.0))
        before = full_weights(engine)
        spoil(engine, torch.zeros_like)
        for step in range(3):
            one_step(engine, step, rank, world_size)
        after = full_weights(engine)
        found[f"{name} {cell.label}"] = {
            "moved": not torch.equal(before[MATRIX], after[MATRIX]),
            "still": [key for key in equal_names(before, after) if key != MATRIX],
            "not finite": not_finite(engine),
            "weights": {key: value.float().sum().item() for key, value in after.items()},
        }
        engine.destroy()
    return found


def equal_names(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return sorted(set(one) - set(equal(one, other)))


def test_a_matrix_without_gradient_stands_still_and_stays_finite() -> None:
    cells = [(name, Cell(stage=(0, 1, 2, 3)[number % 4])) for number, name in enumerate(OPTIMIZERS)]
    cells += [(name, Cell(stage=stage, dtype="bf16")) for name in ("Muon", "LionMuon") for stage in (1, 3)]
    first, second = run_ranks(2, zero_gradients, cells, timeout=200)
    for label, facts in first.items():
        assert facts["not finite"] == [] == second[label]["not finite"], label
        assert facts["weights"] == second[label]["weights"], label
        assert not facts["moved"], label
        if "bf16" not in label:
            assert facts["still"] == [], label


# ---- gradients that overflow when squared or added up


def huge_gradients(
    rank: int, world_size: int, cells: list[tuple[str, dict[str, Any], Cell]]
) -> dict[str, dict[str, Any]]:
    """Of each cell and size of the gradient of rank 1: whether the step was skipped, and what it left."""
    found = {}
    for name, params, cell in cells:
        for size in (1e19, 1e30, 3e38):
            engine = start(cell, world_size, settings_of(name, **params))
            one_step(engine, 0, rank, world_size)
            hook = spoil(engine, lambda g, size=size: torch.full_like(g, size)) if rank == 1 else None
            before = snapshot(engine)
            skipped = engine.skipped_steps + own_optimizer(engine).skipped_steps
            one_step(engine, 1, rank, world_size)
            skipped = engine.skipped_steps + own_optimizer(engine).skipped_steps - skipped
            changed = differences(before, snapshot(engine))
            if hook is not None:
                hook.remove()
            one_step(engine, 2, rank, world_size)
            found[f"{name} {params} {cell.label} {size:g}"] = {
                "skipped": skipped,
                "moved by a skipped step": changed if skipped else [],
                "moved": bool(changed),
                "not finite": not_finite(engine),
                "weights": {key: value.float().sum().item() for key, value in full_weights(engine).items()},
            }
            engine.destroy()
    return found


HUGE = [
    *(("LionMuon", {"period": 2}, Cell(stage=stage)) for stage in (0, 1, 2, 3)),
    *(("Muon", {}, Cell(stage=stage)) for stage in (0, 3)),
    ("Lion", {}, Cell(stage=2)),
    ("Lion", {"momentum_dtype": "bfloat16"}, Cell(stage=1)),
    ("Muon", {"momentum_dtype": "int8"}, Cell(stage=3)),
    ("LionMuon", {"momentum_dtype": "bfloat16"}, Cell(stage=2, dtype="bf16")),
    ("Muon", {}, Cell(stage=3, dtype="bf16")),
    ("SpectralLion", {}, Cell(stage=1)),
    ("StableAdamW", {}, Cell(stage=2)),
]


def test_a_gradient_that_overflows_is_skipped_by_all_or_leaves_all_finite() -> None:
    first, second = run_ranks(2, huge_gradients, HUGE, timeout=300)
    for label, facts in first.items():
        other = second[label]
        assert (facts["skipped"], facts["weights"]) == (other["skipped"], other["weights"]), label
        for found in (facts, other):
            assert found["not finite"] == [], label
            assert found["moved by a skipped step"] == [], label
            assert found["moved"] is not bool(found["skipped"]), label
    # Both happen.
    assert {bool(facts["skipped"]) for facts in first.values()} == {True, False}
