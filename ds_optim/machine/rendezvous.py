"""What this machine must be rid of before ranks join on it, and what they need no more when all of them have."""

from __future__ import annotations

import os

from ds_optim.machine import extensions, shared_memory


def prepare() -> None:
    """Take away what ranks that were killed as they started left, and build what the ranks' set-up builds.

    Raises ``UserError`` where another build is in the way.
    """
    from deepspeed.accelerator import get_accelerator

    extensions.clear_left_overs()
    shared_memory.sweep()
    if get_accelerator().device_name() == "cpu":
        extensions.load_op("ShareMemCommBuilder")


def settle() -> None:
    """All ranks have come to the end of DeepSpeed's set-up."""
    shared_memory.unlink_own(os.environ)
