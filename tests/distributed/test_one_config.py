"""One config means one thing: to ds_optim.initialize, which the doctor tries, and to ds-optim train."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import ds_optim
from ds_optim.errors import UserError
from ds_optim.job.deepspeed_json import deepspeed_config, settings_from_json
from ds_optim.job.settings import make_settings
from ds_optim.machine import ranks
from ds_optim.zero.reading import load_config

from .harness import run_ranks
from .small_runs import new_model, quiet

pytestmark = pytest.mark.full

LION = '"optimizer": {"type": "Lion", "params": {"lr": 0.001}}'
WARMUP = '"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 4}}'
# What is taken, and what it means: (bf16, stage, clip, micro-batch, accumulation).
TAKEN = {
    "comments": ('{ // a config\n"train_batch_size": 4, # in all\n%s}', (False, 0, 1.0, 2, 1)),
    "switch in words": ('{"train_batch_size": 4, "bf16": {"enabled": "true"}, %s}', (True, 0, 1.0, 2, 1)),
    "switch as a number": ('{"train_batch_size": 4, "bf16": {"enabled": 1}, %s}', (True, 0, 1.0, 2, 1)),
    "old name": ('{"train_batch_size": 4, "bfloat16": {"enabled": true}, %s}', (True, 0, 1.0, 2, 1)),
    "stage in words": (
        '{"train_batch_size": 4, "zero_optimization": {"stage": "2"}, %s}',
        (False, 2, 1.0, 2, 1),
    ),
    "micro-batch auto": (
        '{"train_batch_size": 12, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 3, %s}',
        (False, 0, 1.0, 2, 3),
    ),
    "accumulation auto": (
        '{"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto", %s}',
        (False, 0, 1.0, 2, 3),
    ),
}
# What nobody takes, and what only those with arguments of their own do.
REFUSED = {
    "twice": '{"train_batch_size": 4, "zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 0}, %s}',
    "typo": '{"train_batch_size": 4, "zero_optimization": {"stage": 1, "overlap_com": true}, %s}',
    "switch": '{"train_batch_size": 4, "bf16": {"enabled": "maybe"}, %s}',
    "text": '{"train_batch_size": 4, "wall_clock_breakdown": "false", %s}',
    "product": '{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, %s}',
}
ARGUMENTS = {
    "bf16": '{"train_batch_size": 4, "bf16": {"enabled": "auto"}, %s}',
    "clip": '{"train_batch_size": 4, "gradient_clipping": "auto", %s}',
    "batch": '{"train_micro_batch_size_per_gpu": "auto", %s}',
    "stage": '{"train_batch_size": 4, "zero_optimization": {"stage": "auto"}, %s}',
}


def meant(engine: Any) -> tuple[Any, ...]:
    batch = (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
    return (engine.bfloat16_enabled(), engine.zero_optimization_stage(), engine.gradient_clipping(), *batch)


def by_initialize(path: Path) -> tuple[Any, ...]:
    engine = ds_optim.initialize(model=new_model(), config=str(path))[0]
    found = meant(engine)
    engine.destroy()
    return found


def by_train(path: Path) -> tuple[Any, ...]:
    settings = make_settings(**settings_from_json(load_config(path), {}))
    config = deepspeed_config(settings, ranks.world_size())
    batch = (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"])
    stage = config["zero_optimization"]["stage"]
    return (config["bf16"]["enabled"], stage, config["gradient_clipping"], *batch)


def lines(path: Path, doors: Sequence[Callable[[Path], Any]]) -> list[str]:
    """What each makes of a config, or says against it."""
    found = []
    for door in doors:
        try:
            found.append(str(door(path)))
        except UserError as error:
            found.append(f"refused: {error}")
    return found


def read_everywhere(rank: int, world_size: int, folder: Path) -> dict[str, list[str]]:
    quiet()
    found = {}
    texts = {**{name: text for name, (text, _) in TAKEN.items()}, **REFUSED, **ARGUMENTS}
    for name, text in texts.items():
        path = folder / f"{name}.json"
        if rank == 0:
            path.write_text(text.replace("%s", LION))
        dist.barrier()
        found[name] = lines(path, (by_initialize, by_train))
    path = folder / f"scheduler{rank}.json"
    path.write_text(f'{{"train_batch_size": 4, {LION}, {WARMUP}}}')
    found["scheduler"] = lines(path, (by_initialize,))
    return found


def test_who_reads_a_config_reads_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(2, read_everywhere, tmp_path)
    assert first == second
    for name, (_, meaning) in TAKEN.items():
        assert set(first[name]) == {str(meaning)}, name
    assert first["scheduler"] == [str((False, 0, 1.0, 2, 1))]
    for name in REFUSED:
        assert first[name][0].startswith("refused: "), name
        assert len(set(first[name])) == 1, name
    for name in ARGUMENTS:
        initialize, train = first[name]
        assert re.match("refused: .*: write ", initialize), name
        assert train.startswith("("), "train has flags, and defaults of its own"


def test_the_callers_config_is_left_alone() -> None:
    given: dict[str, Any] = {"optimizer": {"type": "Lion", "params": {}}, "bf16": {"enabled": "true"}}
    before = copy.deepcopy(given)
    assert ds_optim.from_config(new_model(), given)[1]["bf16"] == {"enabled": True}
    assert given == before
