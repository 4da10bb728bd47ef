"""DeepSpeed's checkpoints by parameter: read safely, cut anew, handed to other optimizers."""

from __future__ import annotations

from ds_optim.zero.checkpoints.load import load_checkpoint
from ds_optim.zero.checkpoints.portable import Portable
from ds_optim.zero.checkpoints.reader import open_checkpoint
from ds_optim.zero.checkpoints.reshard import Resharded, reshard

__all__ = ["Portable", "Resharded", "load_checkpoint", "open_checkpoint", "reshard"]
