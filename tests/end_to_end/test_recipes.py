"""Recipes for axolotl, ms-swift and LlamaFactory, where those are installed (nothing here depends on them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

from .test_trainers import OFFLOAD, arguments, auto, config, fresh

PLAIN = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "use_cpu": True}
PLAIN |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}


def axolotl(folder: Path) -> Any:
    """Its trainer, as its builder asks the plugin for it."""
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    from examples import small

    plugins = PluginManager.get_instance()
    plugins.register("examples.recipes.axolotl_plugin.DsOptimPlugin")
    settings = AxolotlTrainingArguments(output_dir=str(folder), deepspeed=auto(2), **PLAIN)
    trainer = plugins.get_trainer_cls(DictDefault({}))
    return trainer(
        model=small.model(),
        args=settings,
        train_dataset=small.data(),
        eval_data_collator=None,
        bench_data_collator=None,
    )


def swift(folder: Path) -> Any:
    """What its trainers do with ``--optimizer``, without the template and the registered model that they ask for."""
    from swift.optimizers import optimizers_map
    from transformers import Trainer

    import examples.recipes.swift_plugin  # noqa: F401 (registers)
    from examples import small

    class LikeTheirs(Trainer):
        def __init__(self, *, args: Any, **kwargs: Any) -> None:
            self.optimizer_callback = optimizers_map["lion_muon"](args, self)
            super().__init__(args=args, **kwargs)

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.optimizer_callback.create_optimizer(model=model)
            return self.optimizer

    settings = config(3, OFFLOAD, zero_force_ds_cpu_optimizer=False)
    del settings["optimizer"]
    made = arguments(folder, settings, gradient_accumulation_steps=1)
    made.max_epochs = None  # which its own arguments have
    return LikeTheirs(model=small.model(), args=made, train_dataset=small.data())


def llamafactory(folder: Path) -> Any:
    """Its trainer of supervised runs, which the recipe has replaced."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.hparams.training_args import TrainingArguments
    from llamafactory.train.sft import workflow

    import examples.recipes.llamafactory_train  # noqa: F401 (registers)
    from examples import small

    settings = TrainingArguments(output_dir=str(folder), deepspeed=auto(3), **PLAIN)
    return workflow.CustomSeq2SeqTrainer(
        finetuning_args=FinetuningArguments(),
        processor=None,
        model=small.model(),
        args=settings,
        train_dataset=small.data(),
        tokenizer=small.tokenizer(),
    )


def trained(rank: int, world_size: int, folder: Path, make: Any) -> tuple[str, list[float]]:
    import ds_optim.hf

    fresh()
    trainer = make(folder)
    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    return type(ds_optim.hf.stepping(trainer.optimizer)).__name__, losses


@pytest.mark.full
@pytest.mark.parametrize(
    ("needs", "make"),
    [
        ("axolotl.core.trainers.base", axolotl),
        ("swift.optimizers", swift),
        ("llamafactory.train.sft.workflow", llamafactory),
    ],
)
def test_the_recipes_optimizer_steps(tmp_path: Path, needs: str, make: Any) -> None:
    pytest.importorskip(needs, exc_type=ImportError)
    for stepped, losses in run_ranks(2, trained, tmp_path, make, timeout=200):
        assert stepped == "LionMuon"
        assert len(set(losses)) == len(losses) >= 3
