"""transformers' Trainer and Accelerate by their DeepSpeed JSON: ``"optimizer": {"type": "LionMuon"}`` works in both.

    class MyTrainer(ds_optim.hf.OptimizerFromConfig, SFTTrainer): ...   # or Trainer, or any other of them

    optimizer = ds_optim.hf.optimizer(accelerator, model, lr=1e-3)      # in place of accelerate.utils.DummyOptim

Nothing of theirs or of DeepSpeed's is patched: a trainer's own hook builds the optimizer, and the JSON that DeepSpeed
is handed has none. Transformers is imported where it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_optim.hf.config import optimizer
from ds_optim.hf.numbers import numbers, stepping
from ds_optim.hf.trainer import OptimizerFromConfig

if TYPE_CHECKING:
    from ds_optim.hf.callback import OptimizerCallback

__all__ = ["OptimizerCallback", "OptimizerFromConfig", "numbers", "optimizer", "stepping"]


def __getattr__(name: str) -> Any:
    if name == "OptimizerCallback":
        from ds_optim.hf.callback import OptimizerCallback

        return OptimizerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
