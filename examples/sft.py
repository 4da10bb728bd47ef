"""TRL's SFTTrainer by the DeepSpeed JSON alone. Run: torchrun --nproc-per-node 2 -m examples.sft"""

from __future__ import annotations

import sys
from typing import Any

from trl import SFTConfig, SFTTrainer

import ds_optim.hf
from examples import small


class MyTrainer(ds_optim.hf.OptimizerFromConfig, SFTTrainer):
    """The JSON's "optimizer" is ds_optim's; so it is with TRL's other trainers."""


def main(config: Any = small.CONFIG, out: str = "out/sft", resume: str | None = None) -> tuple[list[float], str]:
    """The losses of the steps that were taken, and the class of the optimizer that took them.

    resume: a checkpoint of an earlier run, such as out/sft/checkpoint-3.
    """
    arguments = SFTConfig(
        output_dir=out,
        deepspeed=config,
        max_steps=small.STEPS,
        per_device_train_batch_size=small.MICRO_BATCH,
        learning_rate=small.LR,
        weight_decay=small.WEIGHT_DECAY,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        bf16=False,  # the JSON has no "bf16"
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        use_cpu=small.ON_CPU,
    )
    trainer = MyTrainer(
        model=small.model(), args=arguments, train_dataset=small.data(), processing_class=small.tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    first = int(resume.rpartition("-")[2]) if resume else 0
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs and logs["step"] > first]
    return losses, type(ds_optim.hf.stepping(trainer.optimizer)).__name__


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
