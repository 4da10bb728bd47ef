"""A user's mistake is one line on every rank, before DeepSpeed's first collective, whoever made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim

from .harness import run_ranks
from .models import TinyNet
from .small_runs import MUON, Cell, new_model, quiet


class Wider(TinyNet):
    """Another shape for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(24, 2, bias=False)


class Reordered(TinyNet):
    """The same parameters in another order."""

    def __init__(self) -> None:
        super().__init__()
        square = self.square
        del self.square
        self.square = square


class Longer(TinyNet):
    """One parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)


def frozen() -> nn.Module:
    model = new_model()
    model.square.weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


def section(**params: Any) -> dict[str, Any]:
    return Cell(stage=2).json(2, {"type": "LionMuon", "params": params})


def good() -> dict[str, Any]:
    return {"model": new_model(), "config": section()}


def with_config(**settings: Any) -> dict[str, Any]:
    return {"model": new_model(), "config": {**section(), **settings}}


MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    # name: (what goes into ds_optim.initialize, parts of the line)
    "unknown optimizer": (
        lambda: with_config(optimizer={"type": "LionMoun"}),
        ("unknown optimizer type 'LionMoun'", "'LionMuon'"),
    ),
    "unknown key": (lambda: {"model": new_model(), "config": section(perod=2)}, ("'perod'", "'period'")),
    "negative lr": (lambda: {"model": new_model(), "config": section(lr=-1.0)}, ("lr is -1.0",)),
    "betas": (lambda: {"model": new_model(), "config": section(betas=[0.9, 1])}, ("betas is 1", "[0, 1)")),
    "period": (lambda: {"model": new_model(), "config": section(period=0)}, ("period is 0",)),
    "pattern": (
        lambda: {"model": new_model(), "config": section(matrix_exclude=["nowhere"])},
        ("'nowhere' matches no parameter",),
    ),
    "setting": (lambda: with_config(zero_optimization={"stage": 2, "zenflow": {}}), ("zenflow", "leave it out")),
    "both": (
        lambda: {**good(), "optimizer": torch.optim.SGD(new_model().parameters(), lr=0.1)},
        ("given in code and in the config ('LionMuon')",),
    ),
    "two configs": (
        lambda: {**good(), "config_params": section(lr=1.0)},
        ("the config is given twice",),
    ),
    "no config": (lambda: {"model": new_model()}, ("needs a config",)),
    "no model": (lambda: {"config": section()}, ("needs a model",)),
    "missing file": (lambda: {"model": new_model(), "config": "missing.json"}, ("cannot read", "missing.json")),
    "groups beside the JSON": (
        lambda: {**good(), "model_parameters": [{"params": []}]},
        ("model_parameters holds parameter groups",),
    ),
    "typo": (
        lambda: with_config(zero_optimization={"stage": 2, "overlap_com": True}),
        ("no setting 'zero_optimization.overlap_com' (did you mean 'overlap_comm'?)",),
    ),
    "removed": (lambda: with_config(elasticity={"micro_batch_sizes": [2]}), ("Elastic training has been removed",)),
    "extra": (lambda: with_config(bf16={"enabled": False, "loss_scale": 0}), ("no setting 'bf16.loss_scale'",)),
    "batch sizes": (lambda: with_config(train_batch_size=7), ("train_batch_size 7 is not micro_batch",)),
    "auto": (lambda: with_config(bf16={"enabled": "auto"}), ('bf16.enabled is "auto"', "write true or false")),
    "text for a switch": (lambda: with_config(prescale_gradients="false"), ("is 'false'", "write true or false")),
    "mesh": (
        lambda: {**good(), "mesh_param": (1, 2)},
        ("a mesh is not supported", "neither mesh_param nor data_parallel_size"),
    ),
}
# What one rank may have otherwise than the rest, and no rank is wrong by itself.
DISAGREEMENTS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "shape": (lambda: {**good(), "model": Wider()}, ("another model than rank 0",)),
    "order": (lambda: {**good(), "model": Reordered()}, ("another model than rank 0",)),
    "number": (lambda: {**good(), "model": Longer()}, ("another model than rank 0",)),
    "dtype": (lambda: {**good(), "model": new_model("bf16")}, ("another model than rank 0",)),
    "frozen": (lambda: {**good(), "model": frozen()}, ("another model than rank 0",)),
    "stage": (lambda: with_config(zero_optimization={"stage": 1}), ("another config than rank 0",)),
    "type": (lambda: with_config(optimizer=dict(MUON)), ("another config than rank 0",)),
    "theirs": (lambda: with_config(optimizer={"type": "AdamW"}), ("another config than rank 0",)),
    "lr": (lambda: {"model": new_model(), "config": section(lr=0.5)}, ("another config than rank 0",)),
}


def attempt(call: Callable[..., Any], **options: Any) -> tuple[str, str]:
    """(error, line) of a call."""
    try:
        call(**options)
    except Exception as problem:
        return type(problem).__name__, str(problem)
    return "", ""


def mistakes(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """Each mistake by all ranks and by rank 1 alone, each disagreement of rank 1; then a run that must work."""
    quiet()
    found = {}
    for name, (make, _) in MISTAKES.items():
        found[f"{name}, all"] = attempt(ds_optim.initialize, **make())
        found[f"{name}, rank 1"] = attempt(ds_optim.initialize, **(make() if rank == 1 else good()))
    for name, (make, _) in DISAGREEMENTS.items():
        found[f"{name}, rank 1"] = attempt(ds_optim.initialize, **(make() if rank == 1 else good()))
    found["nothing"] = attempt(ds_optim.initialize, **good())
    return found


def test_every_rank_raises_the_same_line() -> None:
    ranks = run_ranks(3, mistakes)
    parts = {name: wanted for cases in (MISTAKES, DISAGREEMENTS) for name, (_, wanted) in cases.items()}
    for rank, found in enumerate(ranks):
        assert found.pop("nothing") == ("", ""), "after all these errors the ranks are still in step"
        for label, (error, line) in found.items():
            where = f"rank {rank}, {label}: {error}: {line}"
            assert error == "UserError", where
            assert all(part in line for part in parts[label.split(", ")[0]]), where
            assert "\n" not in line, where
            assert line == ranks[0][label][1], where
            if label.split(", ")[0] in DISAGREEMENTS:
                assert "rank 1 has" in line, where


def refused_by_deepspeed(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """What DeepSpeed alone finds wrong, while it builds the engine, or would find on rank 0 alone."""
    quiet()
    theirs: dict[str, dict[str, Any]] = {
        "optimizer's parameter": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "btas": [0.9, 0.99]}}},
        "optimizer's value": {"optimizer": {"type": "SGD", "params": {"lr": -1.0}}},
        "scheduler": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
        "combination": {
            "zero_optimization": {"stage": 3, "reduce_scatter": True},
            "optimizer": {"type": "deepspeed:Muon", "params": {"lr": 1e-3}},
        },
        "wandb": {"wandb": {"enabled": True}},
    }
    return {name: attempt(ds_optim.initialize, **with_config(**settings)) for name, settings in theirs.items()}


@pytest.mark.full
def test_what_deepspeed_refuses_is_one_line_on_every_rank() -> None:
    first, second = run_ranks(2, refused_by_deepspeed)
    assert first == second
    parts = {
        "optimizer's parameter": "got an unexpected keyword argument 'btas'",
        "optimizer's value": "Invalid learning rate: -1.0",
        "scheduler": "warmup_num_steps must be a positive integer, got 0",
        "combination": "reduce scatter",
        "wandb": "wandb.enabled is true, and wandb is not installed: pip install wandb",
    }
    for name, part in parts.items():
        assert first[name][0] == "UserError", (name, first[name])
        assert part in first[name][1], name
        assert "\n" not in first[name][1], name


def one_bad_file(rank: int, world_size: int, folder: Path) -> dict[str, tuple[str, str]]:
    """A JSON file that is broken on rank 1's machine, by both functions that read one."""
    import deepspeed

    quiet()
    path = folder / f"rank{rank}.json"
    path.write_text(json.dumps(section()) if rank != 1 else '{"optimizer": ')
    found = {"initialize": attempt(ds_optim.initialize, model=new_model(), config=str(path))}
    found["from_config"] = attempt(ds_optim.from_config, model=new_model(), config=path)
    wider = Wider() if rank == 1 else new_model()
    found["from_config, shape"] = attempt(ds_optim.from_config, model=wider, config=section())
    model = new_model()
    optimizer, config = ds_optim.from_config(model, section())
    deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return found


@pytest.mark.full
def test_a_mistake_in_one_ranks_file_is_raised_on_all(tmp_path: Path) -> None:
    for found in run_ranks(2, one_bad_file, tmp_path):
        for call in ("initialize", "from_config"):
            error, line = found[call]
            assert error == "UserError"
            assert "rank1.json is not JSON (line 1" in line
        assert found["from_config, shape"][0] == "UserError"
        assert "rank 1 has another model than rank 0" in found["from_config, shape"][1]


def disagreeing_clients(rank: int, world_size: int, what: str) -> tuple[str, str]:
    """Plain client optimizers whose settings differ: the first step says so."""
    import deepspeed

    from .small_runs import one_step

    quiet()
    model = new_model()
    options: dict[str, Any] = {"polar": {"steps": 3, "dtype": "float32"}}
    if rank == 1:
        options |= {"steps": {"polar": {"steps": 4, "dtype": "float32"}}, "views": {}}[what]
    views = [{"match": "fused.weight", "split": [24, 24, 24]}] if rank == 1 and what == "views" else []
    optimizer = ds_optim.Muon(ds_optim.param_groups(model, views=views), **options)
    config = {**Cell(stage=3).json(world_size), "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return attempt(lambda: one_step(engine, 0, rank, world_size))


@pytest.mark.full
def test_client_optimizers_that_disagree_are_found_at_the_first_step() -> None:
    said = {
        "steps": "polar.steps (3 on rank 0, 4 on rank 1)",
        "views": "parameters or views of parameter group 'matrix'",
    }
    for what, part in said.items():
        first, second = run_ranks(2, disagreeing_clients, what)
        assert first == second
        assert first[0] == "UserError"
        assert f"the ranks disagree on the {part}" in first[1]
