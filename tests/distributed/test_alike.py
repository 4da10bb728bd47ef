"""Ranks that mean different things are told so, with what differs and where, through plain ``deepspeed.initialize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

import ds_optim
from ds_optim.optimizers.alike import EVERY

from .harness import run_ranks
from .small_runs import Cell, differences, new_model, one_step, quiet, snapshot
from .test_bad_input import attempt

pytestmark = pytest.mark.full

POLAR = {"steps": 3, "dtype": "float32"}
LAYERS = {"square": 2.0}


@dataclass(frozen=True)
class Case:
    """An optimizer and what rank 1 has otherwise: ``says`` is in the line, and both values are."""

    type: str
    other: Mapping[str, Any]
    says: str
    options: Mapping[str, Any] = field(default_factory=dict)


# Everything that a rule reads, in each of the rules' own words.
CASES = [
    Case("Lion", {"lr": 0.5}, "lr of parameter group 'matrix' (0.001 on rank 0, 0.5 on rank 1)", {"lr": 1e-3}),
    Case("Lion", {"betas": (0.9, 0.5)}, "betas of parameter group 'matrix' ((0.9, 0.99) on rank 0, (0.9, 0.5) on rank"),
    Case("Lion", {"weight_decay": 0.5}, "weight_decay of parameter group 'matrix' (1 on rank 0, 0.5 on rank 1)"),
    Case("Lion", {"seed": 1}, "seed of parameter group 'matrix' (0 on rank 0, 1 on rank 1)"),
    Case("Lion", {"momentum_dtype": "bfloat16"}, "momentum_dtype (torch.float32 on rank 0, torch.bfloat16 on rank 1)"),
    Case("Lion", {"diagnostics": True}, "diagnostics (False on rank 0, True on rank 1)"),
    Case("Lion", {"decay_1d": True}, "of parameter group"),
    Case("Signum", {"beta": 0.5}, "beta of parameter group 'matrix' (0.9 on rank 0, 0.5 on rank 1)"),
    Case("Muon", {"momentum": 0.5}, "momentum of parameter group 'matrix' (0.95 on rank 0, 0.5 on rank 1)"),
    Case("Muon", {"nesterov": False}, "nesterov of parameter group 'matrix' (True on rank 0, False on rank 1)"),
    Case("Muon", {"scale": "unit_rms"}, "scale of parameter group 'matrix' ('spectral' on rank 0, 'unit_rms' on rank"),
    Case("Muon", {"polar": {**POLAR, "steps": 4}}, "polar.steps (3 on rank 0, 4 on rank 1)"),
    Case("Muon", {"polar": {**POLAR, "method": "svd"}}, "polar.method (auto on rank 0, svd on rank 1)"),
    Case("Muon", {"exchange": {"bucket_mb": 1}}, "exchange.bucket_mb (", {"polar": POLAR}),
    Case("Muon", {"exchange": {"overlap": False}}, "exchange.overlap (True on rank 0, False on rank 1)"),
    Case("Muon", {"aux_lr": 0.5}, "of parameter group 'aux'"),
    Case("Muon", {"aux": "signum"}, "of parameter group 'aux'"),
    Case("LionMuon", {"period": 3}, "period of parameter group 'matrix' (2 on rank 0, 3 on rank 1)"),
    Case("LionMuon", {"period_mode": "random"}, "period_mode of parameter group 'matrix' ('fixed' on rank 0, 'random'"),
    Case("LionMuon", {"sign_lr_ratio": 3.0}, "of parameter group 'matrix' ("),
    Case("MiMuon", {"tau": 0.5}, "tau of parameter group 'matrix' (0.001 on rank 0, 0.5 on rank 1)"),
    Case("MiMuon", {"gate": "singular_gap"}, "gate of parameter group 'matrix' ('frobenius' on rank 0, 'singular_gap'"),
    Case("CLion", {"nu": 0.5}, "nu of parameter group 'matrix' (1e-06 on rank 0, 0.5 on rank 1)"),
    Case(
        "CLion", {"gate": "tensor"}, "rule of parameter group 'matrix' ('clion_coordinate' on rank 0, 'clion_tensor' on"
    ),
    Case("LASM", {"layer_scales": LAYERS}, "... on rank 0, (('square', 2)) on rank 1)"),
    Case("StoSignSGD", {"beta": 0.5}, "beta of parameter group 'matrix' (0.9 on rank 0, 0.5 on rank 1)"),
    Case("StableLion", {"trust_ratio_max": 9.0}, "trust_ratio_max of parameter group 'matrix' (3 on rank 0, 9 on rank"),
    Case("SpectralLion", {"basis": "weight"}, "rule of parameter group 'matrix' ('spectral_lion_momentum' on rank 0,"),
    Case("Lamb", {"eps": 0.5}, "eps of parameter group 'matrix' ("),
]


def plain_engine(kind: str, options: Mapping[str, Any], stage: int, world_size: int, dtype: str = "fp32") -> Any:
    """An engine by DeepSpeed's own ``initialize``, with a client optimizer."""
    import deepspeed

    quiet()
    model = new_model(dtype)
    optimizer = getattr(ds_optim, kind)(ds_optim.param_groups(model), **options)
    config = {**Cell(stage=stage, dtype=dtype).json(world_size), "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def differing(rank: int, world_size: int, cases: list[Case]) -> list[tuple[str, str, list[str]]]:
    """(error, line, what moved) of a first step, of each case at a stage of its own."""
    found = []
    for number, case in enumerate(cases):
        options = {**case.options, **(case.other if rank == 1 else {})}
        if "polar" in case.other:
            options.setdefault("polar", POLAR)
        engine = plain_engine(case.type, options, number % 4, world_size)
        before = snapshot(engine)
        error, line = attempt(one_step, engine=engine, step=0, rank=rank, world_size=world_size)
        found.append((error, line, differences(before, snapshot(engine))))
    return found


def test_whatever_a_rule_reads_is_compared_before_the_first_step() -> None:
    first, second = run_ranks(2, differing, CASES)
    assert first == second
    for case, (error, line, moved) in zip(CASES, first, strict=True):
        assert error == "UserError", (case, error, line)
        assert line.startswith("the ranks disagree on the "), (case, line)
        assert case.says in line, (case, line)
        assert "\n" not in line
        assert moved == [], case


def other_configs(rank: int, world_size: int) -> dict[str, str]:
    """Settings by which engines make gradients, otherwise on rank 1: the line of ``initialize``."""
    import deepspeed

    quiet()
    changes: dict[str, dict[str, Any]] = {
        "gradient_clipping": {"gradient_clipping": 0.5},
        "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
        "zero_optimization.stage": {"zero_optimization": Cell(stage=1).json(world_size)["zero_optimization"]},
    }
    lines = {}
    for name, change in changes.items():
        model = new_model()
        config = {**Cell(stage=2).json(world_size), "zero_allow_untested_optimizer": True, **(change if rank else {})}
        optimizer = ds_optim.Lion(ds_optim.param_groups(model))
        error, lines[name] = attempt(deepspeed.initialize, model=model, optimizer=optimizer, config=config)
        assert error == "UserError", (name, error, lines[name])
    return lines


def test_settings_that_make_gradients_are_compared_too() -> None:
    first, second = run_ranks(2, other_configs)
    assert first == second
    for name, line in first.items():
        assert f"the ranks disagree on the config's {name} (" in line
    assert "(0.0 on rank 0, 0.5 on rank 1)" in first["gradient_clipping"]


# ---- after the first step


def spoilt(rank: int, world_size: int, stage: int) -> tuple[int, str, str]:
    """A hyperparameter that rank 1 alone sets after step 3; the step that is refused, the error and its line."""
    engine = plain_engine("Lion", {"lr": 1e-3}, stage, world_size)
    for step in range(EVERY + 2):
        if step == 3 and rank == 1:
            key, value = {0: ("lr", 0.5), 2: ("betas", (0.5, 0.5)), 3: ("seed", 7)}[stage]
            engine.basic_optimizer._all_groups[0][key] = value
        error, line = attempt(one_step, engine=engine, step=step, rank=rank, world_size=world_size)
        if error:
            return step + 1, error, line
    return 0, "", ""


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (0, "lr of parameter group 'matrix' (0.001 on rank 0, 0.5 on rank 1)"),
        (2, "betas of parameter group 'matrix' ((0.9, 0.99) on rank 0, (0.5, 0.5) on rank 1)"),
        (3, "seed of parameter group 'matrix' (0 on rank 0, 7 on rank 1)"),
    ],
)
def test_ranks_that_come_apart_are_found_at_the_next_comparison(stage: int, says: str) -> None:
    for step, error, line in run_ranks(2, spoilt, stage):
        assert (step, error) == (EVERY, "UserError")
        assert says in line


def compared_bytes(rank: int, world_size: int) -> list[int]:
    """Bytes that this rank sent in steps whose rule sends none, by the hundred; the rate changes at each step."""
    engine = plain_engine("Lion", {}, 2, world_size)
    sent = []
    for step in range(2 * EVERY):
        for group in engine.basic_optimizer._all_groups:
            group["lr"] = 1e-3 / (step + 1)
        one_step(engine, step, rank, world_size)
        comm = engine.basic_optimizer._binding.comm
        if step + 1 in (EVERY - 1, EVERY, 2 * EVERY - 1, 2 * EVERY):
            sent.append(comm.sent_bytes)
    return sent


def test_a_comparison_is_16_bytes_every_100_steps() -> None:
    assert EVERY == 100
    assert run_ranks(2, compared_bytes) == [[0, 16, 16, 32]] * 2
