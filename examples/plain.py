"""A loop of one's own. Run: torchrun --nproc-per-node 2 -m examples.plain"""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

import ds_optim
from examples import small


def main(config: Any = small.CONFIG, model: Any = None) -> tuple[list[float], str]:
    """The losses of the steps, means over the ranks, and the class of the optimizer that took them."""
    engine, *_ = ds_optim.initialize(model=model or small.model(), config=config)
    losses = []
    # Each rank its own batches of the global order, as Trainer and Accelerate deal them.
    for batch in islice(small.batches(), engine.global_rank, small.STEPS * engine.world_size, engine.world_size):
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / engine.world_size)
    return losses, type(engine.basic_optimizer).__name__


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*main(*sys.argv[1:]), sep="\n")
