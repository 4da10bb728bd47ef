"""LlamaFactory, by the "optimizer" of its DeepSpeed JSON, in place of ``llamafactory-cli train sft.yaml``:

    torchrun --nproc-per-node 8 -m examples.recipes.llamafactory_train sft.yaml

LlamaFactory has no hook for an optimizer or a trainer of one's own. It looks its trainer up in the module that runs a
stage, and this script of yours puts a subclass there; for another stage do the same to ``train.pt.workflow``, ...
"""

from __future__ import annotations

from llamafactory.train.sft import workflow

import ds_optim.hf


class Trainer(ds_optim.hf.OptimizerFromConfig, workflow.CustomSeq2SeqTrainer):
    """LlamaFactory's, with the JSON's optimizer."""


workflow.CustomSeq2SeqTrainer = Trainer

if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    run_exp()
