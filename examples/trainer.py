"""transformers' Trainer by the DeepSpeed JSON alone. Run: torchrun --nproc-per-node 2 -m examples.trainer"""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainingArguments

import ds_optim.hf
from examples import small


class MyTrainer(ds_optim.hf.OptimizerFromConfig, Trainer):
    """The JSON's "optimizer" is ds_optim's."""


def main(
    config: Any = small.CONFIG, out: str = "out/trainer", resume: str | None = None, model: Any = None
) -> tuple[list[float], str]:
    """The losses of the steps that were taken, and the class of the optimizer that took them.

    resume: a checkpoint of an earlier run, such as out/trainer/checkpoint-3.
    """
    arguments = TrainingArguments(
        output_dir=out,
        deepspeed=config,
        max_steps=small.STEPS,
        per_device_train_batch_size=small.MICRO_BATCH,
        learning_rate=small.LR,
        weight_decay=small.WEIGHT_DECAY,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=3,
        report_to="none",
        use_cpu=small.ON_CPU,
    )
    trainer = MyTrainer(model=model or small.model(), args=arguments, train_dataset=small.data())
    trainer.train(resume_from_checkpoint=resume)
    first = int(resume.rpartition("-")[2]) if resume else 0
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs and logs["step"] > first]
    return losses, type(ds_optim.hf.stepping(trainer.optimizer)).__name__


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
