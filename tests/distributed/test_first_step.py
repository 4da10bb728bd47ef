"""What is wrong is found at the first step, on every rank, before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.errors import UserError

from .harness import Outcome, assert_all_raised, device, run_ranks
from .models import batch, share
from .small_runs import (
    BATCH,
    FP32_ACCUMULATION,
    MUON,
    OFFLOAD,
    Cell,
    differences,
    new_model,
    one_step,
    own_optimizer,
    quiet,
    snapshot,
    start,
)

# ------------------------------------------------------------------------------------- checks before any write


def foreign_tensor(engine: Any) -> None:
    """Another tensor of the same shape in the place of the last group's."""
    group = own_optimizer(engine).param_groups[-1]
    group["params"][-1] = nn.Parameter(group["params"][-1].detach().clone() + 1)


def added_group(engine: Any) -> None:
    own_optimizer(engine).param_groups.append({"params": [nn.Parameter(torch.zeros(3, device=device()))]})


def use_muon(engine: Any) -> None:
    """As ``deepspeed.initialize`` does for a JSON of type Muon, but for ``row``: in a group of ours where some have the
    mark and some have not, DeepSpeed fails by itself before it calls step()."""
    for name, p in engine.module.named_parameters():
        outside = ("embed.weight", "lm_head.weight", "row.weight")
        p.use_muon = len(getattr(p, "ds_shape", p.shape)) == 2 and name not in outside


def overridden_step(engine: Any) -> None:
    class Replaced(ds_optim.Muon):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure)

    own_optimizer(engine).__class__ = Replaced


def changed_weight(engine: Any) -> None:
    with torch.no_grad():
        getattr(engine.module.square.weight, "ds_tensor", engine.module.square.weight).add_(0.5)


def tensor_shard(engine: Any) -> None:
    engine.module.square.weight.tensor_model_parallel = True


MISTAKES: dict[Callable[[Any], None], tuple[str, str, bool]] = {
    # mistake: (error, part of the line, whether rank 1 alone may make it)
    foreign_tensor: ("RuntimeError", "", True),
    added_group: ("RuntimeError", "built with 3 parameter groups and has 4", True),
    # DeepSpeed acts on this one by itself, with collectives, before it calls step().
    use_muon: ("UserError", "tall.weight.use_muon is set", False),
    overridden_step: ("RuntimeError", "overrides step()", False),
    changed_weight: ("RuntimeError", "refresh_fp32_params()", True),
    tensor_shard: ("UserError", "is marked as a tensor-parallel shard", True),
}
MISTAKE_CELLS = [
    Cell(stage=0),
    Cell(stage=0, dtype="bf16"),
    Cell(stage=1),
    Cell(stage=2, dtype="bf16"),
    Cell(stage=3),
    Cell(stage=3, dtype="bf16", zero=OFFLOAD),
    Cell(stage=1, dtype="bf16", config=FP32_ACCUMULATION),
]


def mistakes(rank: int, world_size: int) -> list[tuple[str, str, str, str, list[str]]]:
    """(mistake, who, error, line, what moved) for every mistake and cell."""
    found = []
    for cell, (mistake, (_, _, alone)) in itertools.product(MISTAKE_CELLS, MISTAKES.items()):
        if cell == Cell(stage=0) and mistake is changed_weight:
            continue  # the parameters are the masters there: nothing can differ
        if cell.stage == 3 and mistake is foreign_tensor:
            continue  # DeepSpeed puts its own tensors into the groups just before it steps them
        if cell.config == FP32_ACCUMULATION and mistake is added_group:
            continue  # BF16_Optimizer asserts the number of groups itself
        for culprits in ("all", "rank 1") if alone else ("all",):
            engine = start(cell, world_size, MUON)
            if culprits == "all" or rank == 1:
                mistake(engine)
            before = snapshot(engine)
            error, line = "", ""
            try:
                one_step(engine, 0, rank, world_size)
            except Exception as problem:
                error, line = type(problem).__name__, str(problem)
            moved = [key for key in differences(before, snapshot(engine)) if not key.startswith("momentum_buffer")]
            found.append((f"{mistake.__name__} {cell.label}", culprits, error, line, moved))
            engine.destroy()
    return found


@pytest.mark.full
def test_mistakes_are_found_on_every_rank_before_any_write() -> None:
    ranks = run_ranks(2, mistakes, timeout=300)
    for rank, found in enumerate(ranks):
        for (label, culprits, error, line, moved), reference in zip(found, ranks[0], strict=True):
            where = f"rank {rank}, {label} by {culprits}: {error}: {line}"
            expected, part, _ = next(v for m, v in MISTAKES.items() if m.__name__ == label.split()[0])
            assert error == expected, where
            assert part in line, where
            assert "\n" not in line, where
            assert line == reference[3], where
            assert moved == [], f"{where}: {moved}"


def healed(rank: int, world_size: int) -> dict[str, list[str]]:
    """Weights changed in place after initialize, then refreshed: what differs from a model that had them before."""
    found = {}
    for cell in (Cell(stage=0, dtype="bf16"), Cell(stage=1), Cell(stage=2, dtype="bf16"), Cell(stage=3)):
        model = new_model(cell.dtype)
        with torch.no_grad():
            model.square.weight.add_(0.5)  # type: ignore[union-attr, operator]
        expected = start(cell, world_size, MUON, model)
        one_step(expected, 0, rank, world_size)
        engine = start(cell, world_size, MUON)
        changed_weight(engine)
        engine.optimizer.refresh_fp32_params()
        one_step(engine, 0, rank, world_size)
        found[cell.label] = differences(snapshot(expected), snapshot(engine))
    return found


def test_refreshed_weights_are_trained() -> None:
    for found in run_ranks(2, healed):
        assert found == {label: [] for label in found}


def replaced_optimizer(rank: int, world_size: int) -> None:
    """Something between us and the engine swaps the optimizer, as accelerate does under offload."""
    import deepspeed

    real = deepspeed.initialize

    def swap(*, optimizer: Any, **options: Any) -> Any:
        return real(optimizer=torch.optim.SGD(options["model"].parameters(), lr=0.1), **options)

    deepspeed.initialize = swap
    start(Cell(stage=2), world_size, MUON)


def test_a_replaced_optimizer_is_an_error() -> None:
    outcomes: list[Outcome] = run_ranks(2, replaced_optimizer, expect_error=True)
    for outcome in outcomes:
        assert outcome.error_type == "RuntimeError"
        assert "DeepSpeed steps SGD instead of Muon" in outcome.message


# ------------------------------------------------------------------------- settings that the engine alone knows

CLIENTS: Mapping[str, Cell] = {
    "check_grad_overflow": Cell(stage=2, dtype="bf16", config={"bf16": {"check_grad_overflow": False}}),
    "compute_grad_norm": Cell(stage=1, zero={"compute_grad_norm": False}),
    "nvme": Cell(stage=2, zero={"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere", "pin_memory": False}}),
    "an optimizer is given in code and in the config": Cell(
        stage=1, config={"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    ),
    "use_muon is set": Cell(stage=1, config={"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}),
    # the last: DeepSpeed keeps it for the life of a process
    "torch_autocast": Cell(stage=2, config={"torch_autocast": {"enabled": True, "dtype": "float16"}}),
}


def client_settings(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """For a plain client optimizer: (error, line) of ``deepspeed.initialize`` under each setting."""
    import deepspeed

    quiet()
    found = {}
    for part, cell in CLIENTS.items():
        model = new_model(cell.dtype)
        optimizer = ds_optim.Muon(ds_optim.param_groups(model))
        config = {**cell.json(world_size), "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        try:
            deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            found[part] = "", ""
        except Exception as problem:
            found[part] = type(problem).__name__, str(problem)
    return found


@pytest.mark.full
def test_a_client_optimizer_refuses_settings_at_the_end_of_initialize() -> None:
    for found in run_ranks(2, client_settings):
        for part, (error, line) in found.items():
            assert error == "UserError", f"{part}: {error}: {line}"
            assert part in line
            assert "\n" not in line


# ------------------------------------------------------------------------------------ after an engine is gone

GONE: Mapping[str, list[Cell]] = {
    "z1": [Cell(stage=1)],
    "z2, then z0": [Cell(stage=2), Cell(stage=0)],
    "z3": [Cell(stage=3)],
    "z1, then z3": [Cell(stage=1), Cell(stage=3)],
    "z2, then z0 in bf16": [Cell(stage=2, dtype="bf16"), Cell(stage=0, dtype="bf16")],
    "z3 of whole parameters, then z1": [
        Cell(stage=3, zero={"stage3_param_persistence_threshold": 10**6}),
        Cell(stage=1),
    ],
}


def after_engines(rank: int, world_size: int) -> dict[str, list[str]]:
    """Engines over one model, one after the other; then plain steps of it and of a copy: what differs."""
    found = {}
    for label, cells in GONE.items():
        model = new_model(cells[0].dtype)
        for cell in cells:
            engine = start(cell, world_size, MUON, model)
            one_step(engine, 0, rank, world_size)
            engine.destroy()
            del engine
        if cells[-1].dtype == "bf16":
            model.float()
        both = [model, new_model()]
        model(*batch(1, BATCH))  # what stage 3 has cut comes together
        both[1].load_state_dict(model.state_dict())
        optimizers = [ds_optim.LionMuon(ds_optim.param_groups(m), lr=0.1) for m in both]
        for step in range(2):
            for m, optimizer in zip(both, optimizers, strict=True):
                m.zero_grad()
                m(*batch(step, BATCH)).backward()
                optimizer.step()
        ours, theirs = (dict(m.named_parameters()) for m in both)
        found[label] = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    return found


@pytest.mark.full
def test_a_model_is_trained_plainly_and_by_others_after_an_engine_is_gone() -> None:
    for found in run_ranks(2, after_engines):
        assert found == {label: [] for label in GONE}


def cut_and_gone(rank: int, world_size: int) -> None:
    model = new_model()
    start(Cell(stage=3), world_size, MUON, model).destroy()
    ds_optim.Lion(ds_optim.param_groups(model)).step()


@pytest.mark.full
def test_shards_of_an_engine_that_is_gone_are_refused_in_one_line() -> None:
    outcomes = run_ranks(2, cut_and_gone, expect_error=True)
    assert_all_raised(outcomes, "UserError", "lies in the shards of a ZeRO-3 engine that is gone: build the model anew")


# --------------------------------------------------------------------------------------- no DeepSpeed around


def test_an_overridden_step_is_refused_without_deepspeed() -> None:
    class Replaced(ds_optim.Lion):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure)

    model = new_model()
    optimizer = Replaced(ds_optim.param_groups(model))
    model(*share(*batch(0, BATCH), 0, 1)).backward()
    with pytest.raises(RuntimeError, match="overrides step"):
        optimizer.step()
    dict(model.named_parameters())["square.weight"].use_muon = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="use_muon"):
        ds_optim.Lion(ds_optim.param_groups(model)).step()
