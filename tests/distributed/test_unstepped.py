"""Callers that step another optimizer than the one they were given: Accelerate under offload, transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim

from .harness import run_ranks
from .small_runs import quiet

pytestmark = pytest.mark.full


def said(work: Callable[[], None]) -> list[str]:
    """What the package warned of in ``work``."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_optim").addHandler(handler)
    work()
    return [line for line in lines if "never stepped" in line]


def accelerated(rank: int, world_size: int, forced: bool) -> list[str]:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    quiet()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        **({} if forced else {"zero_force_ds_cpu_optimizer": False}),
    }

    def train() -> None:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model: Any = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        optimizer: Any = ds_optim.LionMuon(ds_optim.param_groups(model))
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()

    return said(train)


@pytest.mark.parametrize("forced", [True, False])
def test_accelerate_with_offload_steps_a_cpu_adam(forced: bool) -> None:
    pytest.importorskip("accelerate", reason="it is no dependency")
    (lines,) = run_ranks(1, accelerated, forced, timeout=200)
    start = "ds_optim: LionMuon was built and never stepped; DeepSpeedCPUAdam steps its groups: under offload set"
    assert [line[: len(start)] for line in lines] == ([start] if forced else [])


def trained(rank: int, world_size: int, folder: Path, stage: int) -> list[str]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    quiet()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    optimizer = ds_optim.LionMuon(ds_optim.param_groups(model))
    data = [{"input_ids": (row := torch.arange(8) * (i + 1) % 31), "labels": row} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=6,  # of two groups each
        deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": stage}},
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    return said(lambda: trainer.train() and None)


@pytest.mark.parametrize("stage", [2, 3])
def test_transformers_trainer_drops_the_optimizer(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is no dependency")
    ((line,),) = run_ranks(1, trained, tmp_path, stage, timeout=200)
    assert line.startswith("ds_optim: LionMuon was built and never stepped; AdamW steps its parameters")
    assert "optimizer_cls_and_kwargs" in line
