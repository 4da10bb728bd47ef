"""A rule in a user's own file, that of docs/writing-a-rule.md: trains, saves, is cut anew and counted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.cli.app import main
from ds_optim.machine.plugins import PLUGINS, load_plugins
from ds_optim.memory.account import account
from ds_optim.memory.estimate import ZeroSettings, estimate
from ds_optim.memory.estimate_model import shape_of_module
from ds_optim.memory.estimate_optimizers import plan_optimizer
from ds_optim.optimizers.registry import DESCRIBED, OPTIMIZERS
from ds_optim.optimizers.rules import RULES
from tests.tiers import cells

from .harness import run_ranks
from .models import TinyNet
from .resharding import BEFORE, Kind, gathered, held, steps
from .small_runs import bits, own_optimizer, start

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-rule.md"
KIND = Kind(optimizer={"type": "CappedMuon", "params": {"lr": 1e-2, "polar": {"dtype": "float32"}}})
CHANGES = [((2, 1), (3, 3)), ((3, 3), (2, 2)), ((2, 2), (2, 0))]
"""From and to so many ranks at such a stage."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's example as a file, known to this process for as long as the tests here run."""
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert code is not None
    path = tmp_path_factory.mktemp("own") / "capped_muon.py"
    path.write_text(code[1], encoding="utf-8")
    before = os.environ.get(PLUGINS)
    yield path
    for names, name in ((RULES, "capped_muon"), (OPTIMIZERS, "CappedMuon"), (DESCRIBED, "CappedMuon")):
        names.pop(name, None)  # type: ignore[attr-defined]
    os.environ.pop(PLUGINS, None)
    if before is not None:
        os.environ[PLUGINS] = before


def train_and_save(rank: int, world_size: int, plugin: Path, folder: Path, stage: int) -> tuple[Any, dict[str, int]]:
    load_plugins([str(plugin)])
    cell = KIND.cell(stage)
    engine = start(cell, world_size, KIND.optimizer)
    steps(engine, range(BEFORE), rank, world_size)
    engine.save_checkpoint(str(folder))
    return held(engine, cell, rank, world_size), dict(account(engine).state)


def load_and_go_on(rank: int, world_size: int, plugin: Path, folder: Path, stage: int) -> Any:
    load_plugins([str(plugin)])
    cell = KIND.cell(stage)
    engine = start(cell, world_size, KIND.optimizer, TinyNet(seed=9))
    engine.load_checkpoint(str(folder))
    found = held(engine, cell, rank, world_size)
    steps(engine, range(BEFORE, BEFORE + 1), rank, world_size)
    assert {state["step"] for state in own_optimizer(engine).state.values()} == {BEFORE + 1}
    return found


@pytest.mark.parametrize(("one", "other"), cells(CHANGES[:1], CHANGES))
def test_it_trains_saves_and_goes_on_at_another_shape(
    one: tuple[int, int], other: tuple[int, int], plugin: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    seen = run_ranks(one[0], train_and_save, plugin, source, one[1])
    shape = ["--ranks", str(other[0]), "--stage", str(other[1])]
    with pytest.raises(SystemExit) as done:
        main(["reshard", str(source), str(target), *shape, "--plugin", str(plugin)])
    assert done.value.code in (0, None)
    before = gathered(own for own, _ in seen)
    after = gathered(run_ranks(other[0], load_and_go_on, plugin, target, other[1]))
    rows = {name: values for (name, key), values in before.items() if key == "row_sizes"}
    assert rows
    assert all(values.gt(0).all() for values in rows.values())
    assert {key: values.tolist() for key, values in map(_bits, after.items())} == {
        key: values.tolist() for key, values in map(_bits, before.items())
    }
    _check_estimate([state for _, state in seen], one)


def _bits(item: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return item[0], bits(item[1])


def _check_estimate(counted: list[dict[str, int]], shape: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = shape_of_module("tiny", TinyNet())
    plan = plan_optimizer(model, "capped_muon", {"polar": {"dtype": "float32"}}, weights=torch.float32, device="cpu")
    zero = ZeroSettings(stage=shape[1], ranks=shape[0], dtype="fp32", device="cpu")
    assert [dict(rank.state) for rank in estimate(model, plan, zero).ranks] == counted
