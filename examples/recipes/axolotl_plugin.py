"""axolotl, by the "optimizer" of its DeepSpeed JSON. In the YAML:

    deepspeed: ds.json
    plugins:
      - examples.recipes.axolotl_plugin.DsOptimPlugin

Axolotl 0.19 has ``BasePlugin.create_optimizer`` and never calls it; it does ask for the trainer's class.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

import ds_optim.hf


class DsOptimPlugin(BasePlugin):
    """The trainer of supervised runs; for others put the class of axolotl's that they take in its place."""

    def get_trainer_cls(self, cfg: Any) -> Any:
        from axolotl.core.trainers.base import AxolotlTrainer

        class Trainer(ds_optim.hf.OptimizerFromConfig, AxolotlTrainer):
            """Axolotl's, with the JSON's optimizer."""

        return Trainer
