"""Checkpoints with experts that are not cut anew, and what a resumed run may have otherwise: each said in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_optim.errors import UserError
from ds_optim.job.settings import TrainSettings, make_settings
from ds_optim.optimizers.experts import EXPERTS
from ds_optim.survival.resume import Checkpoint, _check
from ds_optim.zero.checkpoints.columns import Column
from ds_optim.zero.checkpoints.expert_columns import of_experts
from ds_optim.zero.checkpoints.folder import expert_file, find_files, model_file, optimizer_file


@pytest.mark.parametrize("second", [None, "layer_0_expert_0_mp_rank_01_model_states.pt"])
def test_experts_beside_tensor_parallel_shards_are_not_read(second: str | None, tmp_path: Path) -> None:
    """By the names of files: DeepSpeed writes an expert's shards under more of them, or those of one rank alone."""
    names = [model_file(0, 1, tensor) for tensor in (0, 1)] + [optimizer_file(0, "", tensor) for tensor in (0, 1)]
    for name in (*names, expert_file(0, 0), *([second] if second else [])):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="which ds-optim reshard does not read") as refused:
        find_files(tmp_path)
    assert ("experts beside tensor parallelism" if second is None else second) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_frozen_experts_are_not_cut_anew() -> None:
    """All of them, or those of one layer: no group of the optimizer has them."""
    column = Column(number=0, count=2, experts=True)
    trained: Any = SimpleNamespace(name="moe.0.w1")
    files: Any = SimpleNamespace(folder="saved", optimizers=range(4))
    experts: Any = SimpleNamespace(names=["moe.0.w1", "moe.1.w1"])
    groups = ([{"name": "matrix"}], [{"name": "matrix of ep_size_2", EXPERTS: True}])
    for own, frozen in zip(groups, ("moe.0.w1", "moe.1.w1"), strict=True):
        found: Any = SimpleNamespace(params=[[trained]], groups=own)
        with pytest.raises(UserError, match=f"saved: {frozen} is frozen: experts are cut anew where all of them are"):
            of_experts(found, column, experts, files)


# ---------------------------------------------------------------------------------------------------- going on


def settings_of(**offload: Any) -> TrainSettings:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": "/one", **offload}}
    config = {"zero_optimization": zero, "aio": {"block_size": 1 << 20}} if offload else {"zero_optimization": zero}
    return make_settings(preset="qwen3-tiny", data="text", steps=4, out=Path("out"), resume=True, deepspeed=config)


@pytest.mark.parametrize("other", [{"nvme_path": "/two"}, {"buffer_count": 8, "pipeline_read": True}])
def test_a_run_goes_on_with_its_files_elsewhere(other: dict[str, Any]) -> None:
    """Neither a path nor how files are read is the run's mathematics; where state lies stays the run's own."""
    notes = {"world_size": 1, "trajectory": settings_of().trajectory()}
    saved = Checkpoint(step=2, folder=Path("out"), notes=notes, files=None)
    assert _check(saved, settings_of(**other))[1] == ()
    with pytest.raises(UserError, match="had deepspeed = "):
        _check(saved, settings_of(device="cpu"))
