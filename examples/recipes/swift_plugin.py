"""ms-swift, with the optimizer in code and none in the DeepSpeed JSON:

    swift sft --external_plugins examples/recipes/swift_plugin.py --optimizer lion_muon --deepspeed zero3 ...

With optimizer offload, take a JSON of your own that has "zero_force_ds_cpu_optimizer": false.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

import ds_optim


class LionMuonCallback(OptimizerCallback):
    """What ms-swift asks for the optimizer."""

    def create_optimizer(self, model: Any = None) -> Any:
        groups = ds_optim.param_groups(self.trainer.model if model is None else model)
        return ds_optim.LionMuon(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)


optimizers_map["lion_muon"] = LionMuonCallback
