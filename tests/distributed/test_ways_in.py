"""The ways in: whichever one takes, the same optimizer steps the same weights, and says so once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim

from .harness import run_ranks
from .small_runs import LION_MUON, Cell, Weights, equal, full_weights, new_model, one_step, quiet, trained_weights

pytestmark = pytest.mark.full

STEPS = 3
CELLS = [Cell(stage=s) for s in (0, 1, 2, 3)] + [
    Cell(stage=2, dtype="bf16"),
    Cell(stage=3, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
]


# ------------------------------------------------------------------------------------------- the same weights


def by_dict(cell: Cell, world_size: int, folder: Path) -> Any:
    return ds_optim.initialize(model=new_model(cell.dtype), config=cell.json(world_size, LION_MUON))[0]


def by_path(cell: Cell, world_size: int, folder: Path) -> Any:
    path = folder / "config.json"
    path.write_text(json.dumps(cell.json(world_size, LION_MUON)))
    return ds_optim.initialize(model=new_model(cell.dtype), config=str(path))[0]


def by_from_config(cell: Cell, world_size: int, folder: Path) -> Any:
    import deepspeed

    model = new_model(cell.dtype)
    optimizer, config = ds_optim.from_config(model, cell.json(world_size, LION_MUON))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def by_class(cell: Cell, world_size: int, folder: Path) -> Any:
    import deepspeed

    model = new_model(cell.dtype)
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), **LION_MUON["params"])  # type: ignore[arg-type]
    config = {**cell.json(world_size), "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def by_class_and_initialize(cell: Cell, world_size: int, folder: Path) -> Any:
    model = new_model(cell.dtype)
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model), **LION_MUON["params"])  # type: ignore[arg-type]
    return ds_optim.initialize(model=model, optimizer=optimizer, config=cell.json(world_size))[0]


WAYS: list[Callable[[Cell, int, Path], Any]] = [by_dict, by_path, by_from_config, by_class, by_class_and_initialize]


def all_ways(rank: int, world_size: int, folder: Path) -> dict[str, list[Weights]]:
    quiet()
    own = folder / str(rank)
    own.mkdir()
    results: dict[str, list[Weights]] = {}
    for cell in CELLS:
        for way in WAYS:
            engine = way(cell, world_size, own)
            results.setdefault(cell.label, []).append(trained_weights(engine, range(STEPS), rank, world_size))
            engine.destroy()
    return results


def test_every_way_in_gives_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    start = {name: p.detach() for name, p in new_model().named_parameters()}
    for results in run_ranks(2, all_ways, tmp_path / "x", timeout=200):
        for label, weights in results.items():
            for way, found in zip(WAYS, weights, strict=True):
                assert not equal(weights[0], found), f"{label}: {way.__name__} differs from {WAYS[0].__name__}"
            assert all(not torch.equal(weights[0][n].float(), p) for n, p in start.items()), f"{label}: nothing moved"


# ------------------------------------------------------------------------------------------------ the choice


def types(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    quiet()
    found = {}
    cells = {
        "AdamW": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "deepspeed:Muon": {"type": "deepspeed:Muon", "params": {"lr": 1e-3}},
        "SGD": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.5}},
        "Muon": {"type": "Muon", "params": {}},
        "lion_muon": {"type": "lion_muon", "params": {"period": "inf"}},
    }
    for name, section in cells.items():
        config = Cell(stage=2).json(world_size, section)
        if name != "Muon" and name != "lion_muon":
            config["zero_allow_untested_optimizer"] = True
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            engine = ds_optim.initialize(model=new_model(), config=config)[0]
            for step in range(2):
                one_step(engine, step, rank, world_size)
        cls = type(engine.basic_optimizer)
        lines = [line for line in said.getvalue().splitlines() if line.startswith("ds_optim")]
        found[name] = (f"{cls.__module__}.{cls.__name__}", "\n".join(lines))
        engine.destroy()
        assert config["optimizer"]["type"] == section["type"], "the caller's config was written to"
    return found


def test_types_go_where_they_say_and_rank_0_says_so() -> None:
    # DeepSpeed's Muon loads a C++ op of its own, which a machine compiles once, in minutes.
    first, second = run_ranks(2, types, timeout=600)
    classes = {name: cls for name, (cls, _) in first.items()}
    assert classes == {
        "AdamW": "torch.optim.adamw.AdamW",
        "deepspeed:Muon": "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam",
        "SGD": "torch.optim.sgd.SGD",
        "Muon": "ds_optim.optimizers.muon.Muon",
        "lion_muon": "ds_optim.optimizers.lion_muon.LionMuon",
    }
    assert first["AdamW"][1] == "ds_optim: optimizer 'AdamW' of DeepSpeed or torch"
    assert first["deepspeed:Muon"][1] == "ds_optim: optimizer 'Muon' of DeepSpeed or torch"
    assert first["Muon"][1].splitlines() == ["ds_optim: optimizer 'Muon' of ds_optim", "ds_optim: Muon"]
    assert first["lion_muon"][1].splitlines() == ["ds_optim: optimizer 'LionMuon' of ds_optim", "ds_optim: LionMuon"]
    assert {said for _, said in second.values()} == {""}, "only rank 0 speaks"


def routes_of_a_client_optimizer(rank: int, world_size: int) -> list[str]:
    """What is printed while a client optimizer is built, bound and stepped twice."""
    import deepspeed

    quiet()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model = new_model()
        optimizer = ds_optim.Muon(ds_optim.param_groups(model))
        config = {**Cell(stage=2).json(world_size), "zero_allow_untested_optimizer": True}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for step in range(2):
            one_step(engine, step, rank, world_size)
    lines = said.getvalue().splitlines()
    first = lines.index("ds_optim: Muon") if "ds_optim: Muon" in lines else None
    return [] if first is None else [line for line in lines[first:] if line.startswith((" ", "ds_optim"))]


def test_a_client_optimizer_prints_its_routes_once_on_rank_0() -> None:
    first, second = run_ranks(2, routes_of_a_client_optimizer)
    assert first.count("ds_optim: Muon") == 1
    assert [line.split(":")[0].strip() for line in first if line.startswith("  ") and not line.startswith("    ")] == [
        "matrix",
        "aux",
        "vector",
    ]
    assert any("square.weight: 24x24" in line for line in first)
    assert second == []


# ------------------------------------------------------------------------------------------------- schedules


def rates(rank: int, world_size: int) -> list[tuple[list[float], list[float]]]:
    """(what the engine shows, lr of each group) after each step of a warmup-decay schedule."""
    quiet()
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 3, "total_num_steps": 6},
    }
    config = Cell(stage=2, config={"scheduler": scheduler}).json(world_size, LION_MUON)
    engine, optimizer, _, schedule = ds_optim.initialize(model=new_model(), config=config)
    assert type(schedule).__name__ == "WarmupDecayLR"
    seen = []
    for step in range(5):
        one_step(engine, step, rank, world_size)
        seen.append((engine.get_lr(), [g["lr"] for g in optimizer.param_groups]))
    return seen


def test_a_deepspeed_schedule_keeps_the_ratio_of_the_rates() -> None:
    for seen in run_ranks(2, rates):
        moved = {lrs[0] for lrs, _ in seen}
        assert len(moved) > 3, "the schedule never moved the rate"
        for shown, own in seen:
            assert shown == own
            matrix, *rest = own
            assert rest == pytest.approx([matrix / 10] * len(rest), rel=1e-12), "aux is lr / sign_lr_ratio"


# -------------------------------------------------------------------------------------------- HF's Trainer


def lion_muon(model: nn.Module, **options: Any) -> ds_optim.LionMuon:
    return ds_optim.LionMuon(ds_optim.param_groups(model), **options)


def hf_trainer(rank: int, world_size: int, folder: Path, stage: int) -> tuple[list[str], list[str]]:
    """Train a tiny GPT-2 in transformers' Trainer; (names that moved, class of the optimizer that stepped)."""
    quiet()
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"input_ids": (row := torch.arange(8) * (i + 1) % 31), "labels": row} for i in range(8)]
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if stage == 3 else {})},
    }
    arguments = TrainingArguments(
        output_dir=str(folder / str(rank)),
        per_device_train_batch_size=2,
        max_steps=2,
        deepspeed=config,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    # Under DeepSpeed, transformers 5 forgets ``optimizers=(optimizer, None)`` and steps an AdamW of its own.
    made = (lambda: lion_muon, {"lr": 1e-2})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=made)
    trainer.train()
    engine = trainer.model_wrapped
    after = full_weights(engine)
    moved = [name for name, p in before.items() if not torch.equal(p, after[name])]
    return sorted(set(before) - set(moved)), [type(engine.basic_optimizer).__name__]


@pytest.mark.parametrize("stage", [2, 3])
def test_transformers_trainer_takes_the_optimizer(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is no dependency")
    for still, stepped in run_ranks(2, hf_trainer, tmp_path, stage, timeout=200):
        assert still == []
        assert stepped == ["LionMuon"]
