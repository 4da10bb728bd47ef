"""What the parent of all ranks imports once per test session; every rank is forked from it."""

from __future__ import annotations

import contextlib
import gc
import os

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401

from ds_optim.machine.extensions import load_op

PRELOADED_BY = os.getpid()
"""Process that ran the imports: in a forked rank it differs from `os.getpid()`."""

torch.set_num_threads(1)

# Imported by every `deepspeed.initialize`, and torch's whole compiler with it: 4 seconds a rank.
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# DeepSpeed compiles these where they are first used and checks the build again in each process.
# Loaded here, the ranks inherit them, and no test's time limit kills a compiler. Without a compiler
# the rank that needs one shows the error.
if get_accelerator().device_name() == "cpu":
    for builder in ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"):
        load_op(builder)

# A package that does not import must fail in the test that needs it, not silently end the server.
with contextlib.suppress(Exception):
    import ds_optim.zero.checkpoints.load
    import ds_optim.zero.initialize
    import ds_optim.zero.seam

# Two seconds a rank that trains by the command, or a model of transformers'.
with contextlib.suppress(Exception):
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import ds_optim.train.loop  # noqa: F401

# What is here stays: the ranks' collector need not walk it, which takes a second per full collection
# (DeepSpeed asks for them), nor touch and so copy its pages.
gc.collect()
gc.freeze()
