"""Accelerate by the DeepSpeed JSON alone. Run: torchrun --nproc-per-node 2 -m examples.accelerated"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator, DeepSpeedPlugin, PartialState

import ds_optim.hf
from examples import small


def main(
    config: Any = small.CONFIG, out: str = "out/accelerated", resume: str | None = None
) -> tuple[list[float], str]:
    """The losses of the steps that were taken, and the class of the optimizer that took them.

    resume: a state that an earlier run saved, such as out/accelerated/3.
    """
    if small.ON_CPU:
        PartialState(cpu=True)  # without it, Accelerate takes each rank on CPUs for a run of its own
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = small.model()
    # "auto" in the JSON would be filled in from lr=…, weight_decay=… here.
    optimizer = ds_optim.hf.optimizer(accelerator, model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, small.batches())
    first = 0
    if resume is not None:
        accelerator.load_state(resume)
        first = int(resume.rpartition("/")[2])
    losses = []
    for number, batch in enumerate(accelerator.skip_first_batches(loader, first), first + 1):
        if number > small.STEPS:
            break
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        # Each group's rate, and what "diagnostics" counts: for accelerator.log(…, step=number)
        accelerator.print(number, losses[-1], ds_optim.hf.numbers(optimizer))
        if number == 3 and resume is None:
            accelerator.save_state(f"{out}/{number}")
    return losses, type(ds_optim.hf.stepping(optimizer)).__name__


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
