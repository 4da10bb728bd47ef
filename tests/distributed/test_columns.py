"""Experts and tensor-parallel shards go on with other data-parallel ranks, at another stage: each column as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim import UserError
from ds_optim.cli.reshard import reshard as cut_by_command
from ds_optim.zero.checkpoints import reshard
from tests.tiers import cells

from . import experts, tensor_models, test_autoep
from .harness import assert_all_raised, run_ranks

BEFORE, AFTER, COLUMNS = 3, 2, 2
FP32 = {"polar": {"steps": 3, "dtype": "float32"}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32": {"type": "NorMuon", "params": {"lr": 1e-2, **FP32}},
    "bfloat16": {"type": "LionMuon", "params": {"lr": 1e-2, "momentum_dtype": "bfloat16", **FP32}},
    "int8": {"type": "LionMuon", "params": {"lr": 1e-2, "momentum_dtype": "int8", **FP32}},
    "scalars": {"type": "LASM", "params": {"lr": 1e-2}},
}


class Shape(NamedTuple):
    ranks: int
    stage: int


class Case(NamedTuple):
    """What is cut, the optimizer, from which shape to which others, and what else the JSON says."""

    kind: str
    optimizer: str
    source: Shape
    targets: tuple[Shape, ...]
    zero: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}


CASES = {
    "experts": Case("moe", "int8", Shape(4, 1), (Shape(2, 2),)),
    "shards": Case("tensor", "int8", Shape(4, 1), (Shape(2, 3),)),
    "experts, and back": Case("moe", "fp32", Shape(2, 2), (Shape(4, 1), Shape(2, 0))),
    "experts without ZeRO": Case("moe", "scalars", Shape(4, 0), (Shape(2, 2),)),
    "experts, dealt round robin": Case("moe", "int8", Shape(4, 2), (Shape(2, 1),), {"round_robin_gradients": True}),
    "experts, data before them": Case(
        "moe", "bfloat16", Shape(4, 2), (Shape(2, 2),), {}, {"use_data_before_expert_parallelism": True}
    ),
    "AutoEP": Case("autoep", "int8", Shape(4, 3), (Shape(2, 3), Shape(2, 0))),
    "AutoEP, and back": Case("autoep", "fp32", Shape(2, 1), (Shape(4, 3),), {}, {"bf16": {"enabled": True}}),
    "shards, and back": Case("tensor", "fp32", Shape(2, 3), (Shape(4, 2), Shape(2, 0))),
    "shards without ZeRO": Case("tensor", "scalars", Shape(4, 0), (Shape(2, 2),)),
}


def start(kind: str, rank: int, shape: Shape, optimizer: Mapping[str, Any], seed: int, zero: Any, config: Any) -> Any:
    if kind == "moe":
        more = {"zero": dict(zero), **config}
        return experts.start(shape.stage, rank, shape.ranks, COLUMNS, optimizer, seed=seed, **more)
    if kind == "autoep":
        more = {"zero": dict(zero), **config, "optimizer": {**optimizer, "params": dict(optimizer["params"])}}
        return test_autoep.start(shape.stage, "LionMuon", seed, **more)
    place = (shape.ranks, COLUMNS, shape.stage, "autotp")
    return tensor_models.start(place, optimizer, tensor_models.TensorNet(seed), **config)[0]


def one_step(kind: str, engine: Any, step: int) -> float:
    """On the same batch on every rank, so that the loss does not depend on how many there are."""
    if kind == "moe":
        return experts.one_step(engine, step, 0)
    if kind == "autoep":
        return test_autoep.one_step(engine, step, 0)
    noise = torch.Generator().manual_seed(step)
    loss = engine(*(torch.randint(tensor_models.WORDS, (4, 5), generator=noise) for _ in range(2)))
    engine.backward(loss)
    engine.step()
    return float(loss)


def whole(kind: str, engine: Any) -> dict[str, Tensor]:
    """The weights of this rank's column."""
    return test_autoep.whole(engine)


def go_on(kind: str, engine: Any) -> list[float]:
    return [one_step(kind, engine, step) for step in range(BEFORE, BEFORE + AFTER)]


def save(rank: int, world_size: int, case: Case, folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    engine = start(case.kind, rank, case.source, OPTIMIZERS[case.optimizer], 0, case.zero, case.config)
    for step in range(BEFORE):
        one_step(case.kind, engine, step)
    engine.save_checkpoint(str(folder), client_state={"position": 7})
    saved = whole(case.kind, engine)
    losses = go_on(case.kind, engine)
    engine.destroy()
    return saved, losses


def load(
    rank: int, world_size: int, case: Case, shape: Shape, folder: Path, by_hand: bool
) -> tuple[dict[str, Tensor], list[float]]:
    engine = start(case.kind, rank, shape, OPTIMIZERS[case.optimizer], 9, case.zero, case.config)
    path, client = engine.load_checkpoint(str(folder)) if by_hand else ds_optim.load_checkpoint(engine, folder)
    assert path is not None
    assert client["position"] == 7
    loaded = whole(case.kind, engine)
    losses = go_on(case.kind, engine)
    engine.destroy()
    return loaded, losses


def column_of(case: Case, ranks: int, rank: int) -> int:
    consecutive = case.config.get("use_data_before_expert_parallelism")
    return rank // (ranks // COLUMNS) if consecutive else rank % COLUMNS


@pytest.mark.parametrize("name", cells(["experts"], list(CASES)))
def test_a_run_goes_on_in_another_shape(name: str, tmp_path: Path) -> None:
    """With the weights of its column to the bit, and the losses of the run that went on."""
    case = CASES[name]
    before = run_ranks(case.source.ranks, save, case, tmp_path / "saved", timeout=200)
    columns = {column_of(case, case.source.ranks, rank): own for rank, own in enumerate(before)}
    for shape in case.targets:
        found = run_ranks(shape.ranks, load, case, shape, tmp_path / "saved", False, timeout=200)
        for rank, (weights, losses) in enumerate(found):
            there, due = columns[column_of(case, shape.ranks, rank)]
            assert [key for key in there if not torch.equal(weights[key], there[key])] == [], (shape, rank)
            # int8 is quantized anew where partitions are cut elsewhere.
            assert losses == pytest.approx(due, rel=1e-2 if case.optimizer == "int8" else 2e-4), (shape, rank)


@pytest.mark.full
@pytest.mark.parametrize("name", ["experts", "shards"])
def test_the_command_writes_what_a_load_cuts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, shape = CASES[name], CASES[name].targets[0]
    run_ranks(case.source.ranks, save, case, tmp_path / "saved", timeout=200)
    cut_by_command(tmp_path / "saved", tmp_path / "cut", ranks=shape.ranks, stage=shape.stage)
    said = capsys.readouterr().out
    assert f"LionMuon, stage {shape.stage}, {shape.ranks} ranks, on each of 2 with {NAMED[name]} " in said
    assert "verified: weights bit for bit, momentum within a step of its quantization" in said
    by_hand, at_once = (
        run_ranks(shape.ranks, load, case, shape, tmp_path / folder, plainly, timeout=200)
        for folder, plainly in (("cut", True), ("saved", False))
    )
    assert [losses for _, losses in by_hand] == [losses for _, losses in at_once]


NAMED = {"experts": "experts of their own", "shards": "shards"}


# --------------------------------------------------------------------------------------------- another number of them


def of_other_columns(rank: int, world_size: int, name: str, columns: int, folder: Path) -> None:
    optimizer = OPTIMIZERS["int8"]
    if name == "experts":
        engine = experts.start(2, rank, world_size, columns, optimizer)
    else:
        engine, _ = tensor_models.start((world_size, columns, 2, "autotp"), optimizer)
    ds_optim.load_checkpoint(engine, folder)


SAID = {
    "experts": "has experts over 2 ranks, and this run over 1: they are cut anew for other ranks and stages alone",
    "shards": "is of 2 tensor-parallel ranks, and this run has 1: shards are cut anew for other data-parallel ranks",
}
SETTINGS = {"experts": "expert_parallel.autoep_size", "shards": "tensor_parallel.autotp_size"}


@pytest.mark.full
@pytest.mark.parametrize("name", ["experts", "shards"])
def test_another_number_of_columns_is_refused(name: str, tmp_path: Path) -> None:
    run_ranks(4, save, CASES[name], tmp_path / "saved", timeout=200)
    outcomes = run_ranks(2, of_other_columns, name, 1, tmp_path / "saved", expect_error=True)
    assert_all_raised(outcomes, "UserError", SAID[name])
    for given, said in (
        ({"ranks": 3}, "--ranks is 3, and the .* 2 ranks, which stay as many: write a multiple of 2"),
        (
            {"config": {SETTINGS[name].split(".")[0]: {SETTINGS[name].split(".")[1]: 4}}},
            rf"{SETTINGS[name]} is 4, and the checkpoint's .* 2 ranks: write 2",
        ),
        *(
            [({"stage": 3}, "DeepSpeed 0.19 does not train its MoE layers at stage 3: write --stage 2")]
            if name == "experts"
            else []
        ),
    ):
        with pytest.raises(UserError, match=said):
            reshard(tmp_path / "saved", tmp_path / "made", **given)
        assert not (tmp_path / "made").exists()
