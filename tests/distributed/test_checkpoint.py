"""Saved and loaded at the same world size, a run goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.optimizers.lion_muon import is_spectral

from .harness import run_ranks
from .models import TinyNet
from .small_runs import (
    FP32_ACCUMULATION,
    LION,
    LION_MUON,
    MUON,
    OFFLOAD,
    ROUND_ROBIN,
    Cell,
    bits,
    differences,
    local_tensors,
    new_model,
    one_step,
    own_optimizer,
    snapshot,
    start,
)

BEFORE, AFTER = 3, 2
"""Steps before the checkpoint and after it: odd, so that LionMuon (period 2) resumes between two phases."""

ADAMW_AUX: Mapping[str, Any] = {"type": "Muon", "params": {**MUON["params"], "aux": "adamw"}}  # type: ignore[dict-item]

SPECTRAL_FIRST_AND_LAST = 14
"""Of five steps this seed makes the first and the last spectral: a count that starts anew would be seen."""
RANDOM_PERIOD: Mapping[str, Any] = {
    "type": "LionMuon",
    "params": {**LION_MUON["params"], "period_mode": "random", "seed": SPECTRAL_FIRST_AND_LAST},  # type: ignore[dict-item]
}

NARROW = [(0, "bfloat16"), (1, "int8"), (2, "bfloat16"), (3, "int8"), (3, "bfloat16")]
CELLS = [
    *((Cell(stage=s), o) for s in (0, 1, 2, 3) for o in (LION, MUON, LION_MUON)),
    *((Cell(stage=s, dtype="bf16"), LION_MUON) for s in (0, 1, 2, 3)),
    (Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION), LION_MUON),
    *((Cell(stage=s, zero=OFFLOAD), LION_MUON) for s in (1, 2, 3)),
    (Cell(stage=3, zero={"sub_group_size": 300}), LION_MUON),
    (Cell(stage=2, zero={"parameter_alignment": True}), LION_MUON),
    (Cell(stage=1, zero=ROUND_ROBIN), LION_MUON),
    (Cell(stage=2, zero={**ROUND_ROBIN, **OFFLOAD}), MUON),
    *((Cell(stage=s), {**LION_MUON, "params": {**LION_MUON["params"], "momentum_dtype": d}}) for s, d in NARROW),
    (Cell(stage=1), ADAMW_AUX),
    (Cell(stage=3), ADAMW_AUX),
    *((Cell(stage=s), RANDOM_PERIOD) for s in (0, 2)),
    (Cell(stage=3, zero={"sub_group_size": 300}), {"type": "LASM", "params": {"lr": 1e-2}}),
    (Cell(stage=1, dtype="bf16"), {"type": "StoSignSGD", "params": {"lr": 1e-2, "seed": 3}}),
]
SCHEDULE = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4, "total_num_steps": 9},
    }
}


def saved_and_loaded(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What differs, bit for bit, between a run and one that went on from its checkpoint."""
    found = {}
    for number, (cell, optimizer) in enumerate(CELLS):
        place = str(folder / str(number))
        cell = Cell(stage=cell.stage, dtype=cell.dtype, zero=cell.zero, config={**cell.config, **SCHEDULE})
        engine = start(cell, world_size, optimizer)
        for step in range(BEFORE):
            one_step(engine, step, rank, world_size)
        engine.save_checkpoint(place)
        at_save = snapshot(engine)
        for step in range(BEFORE, BEFORE + AFTER):
            one_step(engine, step, rank, world_size)
        uninterrupted = snapshot(engine)
        rates = [group["lr"] for group in own_optimizer(engine).param_groups]
        engine.destroy()

        model = TinyNet(seed=9)  # other weights: the checkpoint's must replace them
        resumed = start(cell, world_size, optimizer, model.to(new_model(cell.dtype).embed.weight.dtype))  # type: ignore[union-attr, arg-type]
        resumed.load_checkpoint(place)
        loaded = differences(at_save, snapshot(resumed))
        state = own_optimizer(resumed).state
        held = [state[t] for t in local_tensors(resumed)]
        for step in range(BEFORE, BEFORE + AFTER):
            one_step(resumed, step, rank, world_size)
        found[f"{optimizer['type']} {number} {cell.label}"] = {
            "loaded": loaded,
            "resumed": differences(uninterrupted, snapshot(resumed)),
            "rates": rates == [group["lr"] for group in own_optimizer(resumed).param_groups],
            "dtypes": sorted(
                {str(s[k].dtype) for s in held for k in ("exp_avg", "exp_avg_codes") if k in s}
                ^ {_momentum_dtype(optimizer)}
            ),
            "counts": sorted(
                {(type(s["step"]).__name__, s["step"]) for s in [state[t] for t in local_tensors(resumed)]}
            ),
        }
        resumed.destroy()
    return found


def _momentum_dtype(optimizer: Mapping[str, Any]) -> str:
    return f"torch.{optimizer['params'].get('momentum_dtype', 'float32')}"


def test_a_resumed_phase_is_told_from_one_that_starts_anew() -> None:
    phases = [is_spectral(step, 2, "random", SPECTRAL_FIRST_AND_LAST) for step in range(BEFORE + AFTER)]
    assert phases[BEFORE:] != phases[:AFTER]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(world_size, saved_and_loaded, tmp_path, timeout=300)):
        for label, facts in found.items():
            assert facts == {
                "loaded": [],
                "resumed": [],
                "rates": True,
                "dtypes": [],
                "counts": [("int", BEFORE + AFTER)],
            }, f"rank {rank}, {label}"


def phases(rank: int, world_size: int, folder: Path) -> list[bool]:
    """Whether resuming a step later, with its count at 0, would be noticed: it moves other weights."""
    engine = start(Cell(stage=2), world_size, LION_MUON)
    for step in range(BEFORE):
        one_step(engine, step, rank, world_size)
    engine.save_checkpoint(str(folder))
    results = []
    for count in (BEFORE, 0):
        resumed = start(Cell(stage=2), world_size, LION_MUON)
        resumed.load_checkpoint(str(folder))
        for tensor in local_tensors(resumed):
            own_optimizer(resumed).state[tensor]["step"] = count
        one_step(resumed, BEFORE, rank, world_size)
        results.append(torch.cat([t.detach().clone() for t in local_tensors(resumed)]))
    return [bool(torch.equal(bits(results[0]), bits(results[1])))]


def test_the_phase_of_lion_muon_is_in_the_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(2, phases, tmp_path) == [[False], [False]]


def full_states(rank: int, world_size: int) -> dict[str, list[str]]:
    """Parameters whose full momentum is not there, or not their shape, after the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for cell in (
        Cell(stage=1),
        Cell(stage=2),
        Cell(stage=3),
        Cell(stage=3, zero={"sub_group_size": 300}),
        Cell(stage=2, zero=OFFLOAD),
        Cell(stage=3, zero=OFFLOAD),
        Cell(stage=2, dtype="bf16"),
        Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
    ):
        engine = start(cell, world_size, MUON)
        one_step(engine, 0, rank, world_size)
        wrong = []
        for name, p in engine.module.named_parameters():
            momentum = safe_get_full_optimizer_state(p, "exp_avg")
            shape = getattr(p, "ds_shape", p.shape)
            if momentum is None or momentum.shape != shape or momentum.dtype != torch.float32 or not momentum.any():
                wrong.append(name)
        found[cell.label] = wrong
        engine.destroy()
    return found


@pytest.mark.full
def test_deepspeed_hands_out_the_full_momentum() -> None:
    for found in run_ranks(2, full_states):
        assert found == {label: [] for label in found}
