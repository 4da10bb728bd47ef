"""Lightning's DeepSpeedStrategy with the JSON's optimizer. Run: torchrun --nproc-per-node 2 -m examples.lit"""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import lightning
from lightning.pytorch.strategies import DeepSpeedStrategy

import ds_optim
import ds_optim.hf
from examples import small


class Module(lightning.LightningModule):
    """Yours, and ``configure_optimizers`` that hands over what ``ds_optim.from_config`` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small.model()
        self.optimizer: Any = None
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def train_dataloader(self) -> Any:
        """This rank's batches, in the order of the other examples, from where a checkpoint left off."""
        first = self.trainer.global_step * self.trainer.world_size + self.global_rank
        return islice(small.batches(), first, None, self.trainer.world_size)

    def training_step(self, batch: Any, _: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.log_dict(ds_optim.hf.numbers(self.optimizer))
        return loss


def main(
    config: Any = small.CONFIG, out: str = "out/lit", resume: str | None = None, **options: Any
) -> tuple[list[float], str]:
    """The losses of the steps that were taken, and the class of the optimizer that took them.

    resume: a checkpoint of an earlier run, such as out/lit/3.ckpt. options: more of lightning.Trainer's.
    """
    module = Module()
    module.optimizer, config = ds_optim.from_config(module, config)  # the strategy's JSON has no "optimizer"
    saving = lightning.pytorch.callbacks.ModelCheckpoint(out, "{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"devices": 2, "logger": False, **options}
    strategy = DeepSpeedStrategy(config=config)
    trainer = lightning.Trainer(max_steps=small.STEPS, strategy=strategy, callbacks=[saving], **options)
    trainer.fit(module, ckpt_path=resume)
    return module.losses, type(ds_optim.hf.stepping(trainer.strategy.optimizers[0])).__name__


if __name__ == "__main__":
    print(*main(*sys.argv[1:]), sep="\n")
